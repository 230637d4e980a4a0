from dataclasses import replace

import pytest

from skyrl_async.learner.policy import PolicySource, save_policy
from skyrl_async.learner.teacher import check_teacher, token_ids_hash
from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer

POLICY = PolicySource(hidden_size=16, num_heads=2)


def saved(folder, tokenizer, *, vocab_size: int = 64) -> PolicySource:
    model = build_tiny_model(hidden_size=16, num_heads=2, vocab_size=vocab_size)
    save_policy(model, tokenizer, folder)
    return PolicySource(path=str(folder))


def with_swapped(first: str, second: str):
    """Return the built-in tokenizer with the ids of two words exchanged."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = build_tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words[first], words[second] = words[second], words[first]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        eos_token=tokenizer.eos_token,
        chat_template=tokenizer.chat_template,
    )


def test_the_hash_depends_on_which_token_has_which_id_and_on_nothing_else():
    assert token_ids_hash({"a": 0, "b": 1}) == token_ids_hash({"b": 1, "a": 0})
    hashes = {
        token_ids_hash(v)
        for v in ({"a": 0, "b": 1}, {"a": 1, "b": 0}, {"a": 0}, {"a": 0, "b": 2}, {"ab": 0})
    }
    assert len(hashes) == 5


def test_a_model_with_the_same_tokens_is_a_teacher_whatever_its_size_and_padding(tmp_path):
    tokenizer = build_tiny_tokenizer()
    check_teacher(POLICY, saved(tmp_path / "same", tokenizer))
    check_teacher(POLICY, saved(tmp_path / "padded", tokenizer, vocab_size=96))
    check_teacher(saved(tmp_path / "wide", tokenizer, vocab_size=96), POLICY)


def test_other_tokens_are_refused_with_the_first_difference(tmp_path):
    swapped = saved(tmp_path / "swapped", with_swapped("higher", "lower"))
    with pytest.raises(ValueError, match=r"id \d+ is 'lower' in place of 'higher'"):
        check_teacher(POLICY, swapped)
    more = build_tiny_tokenizer()
    more.add_tokens(["perhaps"])
    with pytest.raises(ValueError, match=f"{len(more)} tokens in place of {len(more) - 1}"):
        check_teacher(POLICY, saved(tmp_path / "more", more))


def test_a_teacher_without_rows_for_all_tokens_is_refused(tmp_path):
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(20)])
    policy = saved(tmp_path / "policy", tokenizer, vocab_size=96)
    teacher = saved(tmp_path / "teacher", tokenizer, vocab_size=64)
    with pytest.raises(ValueError, match=f"64 token ids, but the tokenizer has {len(tokenizer)}"):
        check_teacher(policy, teacher)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer there"):
        check_teacher(POLICY, replace(POLICY, path=str(tmp_path)))
