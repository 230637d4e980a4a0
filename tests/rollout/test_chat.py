from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from skyrl_async.learner.tiny_policy import build_tiny_tokenizer
from skyrl_async.rollout.chat import Chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nplay well<|im_end|>\n{% endif %}"
) + CHATML
LAST_TURN_ONLY = (
    "{% set m = messages[-1] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
NO_STOP_AFTER_REPLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_STOP_AFTER_REPLY = CHATML.replace("<|im_end|>", "<|im_start|>")


def byte_level_tokenizer(
    template: str | None = CHATML, *, stop: str | None = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, so that most texts have several tokenizations."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = ["guess a number\n\n higher lower user assistant system\n"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=stop,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {
    "built-in": build_tiny_tokenizer,
    "byte-level": byte_level_tokenizer,
    "default-system": lambda: byte_level_tokenizer(WITH_DEFAULT_SYSTEM),
}


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(tokenizer, conversation: list[tuple[str, str]]) -> list[int]:
    """What the tokenizer itself makes of the whole conversation, up to the next reply."""
    messages = [{"role": role, "content": content} for role, content in conversation]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return encode(tokenizer, text)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stopped", [True, False])
def test_turns_concatenate_to_the_rendered_conversation(name, stopped):
    tokenizer = TOKENIZERS[name]()
    chat = Chat(tokenizer)
    conversation = [("user", "guess a number from 1 to 10")]
    context = chat.prompt((), "guess a number from 1 to 10")
    assert context == rendered(tokenizer, conversation)

    for reply, observation in [("8", "lower"), ("5 or so", "higher\n\nhigher"), ("", " lower é ")]:
        ids = encode(tokenizer, reply)
        context += [*ids, *chat.stop_token_ids] if stopped else ids
        context += chat.observation(observation, stopped=stopped)
        conversation += [("assistant", reply), ("user", observation)]
        assert context == rendered(tokenizer, conversation)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_messages_of_the_task_come_before_the_observation(name):
    tokenizer = TOKENIZERS[name]()
    chat = Chat(tokenizer)
    messages = ({"role": "system", "content": "guess"}, {"role": "user", "content": "a number"})
    turns = [("system", "guess"), ("user", "a number")]

    assert chat.prompt(messages, "") == rendered(tokenizer, turns)
    assert chat.prompt(messages, "from 1") == rendered(tokenizer, [*turns, ("user", "from 1")])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_reply_that_did_not_stop_gets_the_stop_token_in_the_observation(name):
    chat = Chat(TOKENIZERS[name]())

    after_stop = chat.observation("lower", stopped=True)

    assert not set(after_stop[:1]) & set(chat.stop_token_ids)
    assert chat.observation("lower", stopped=False) == [*chat.stop_token_ids, *after_stop]


def test_returned_lists_belong_to_the_caller():
    chat = Chat(build_tiny_tokenizer())
    for make in (lambda: chat.prompt((), "guess"), lambda: chat.observation("lower", stopped=True)):
        first = make()
        expected = list(first)
        first.append(0)
        assert make() == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decoded_reply_has_no_stop_token_at_its_end(name):
    tokenizer = TOKENIZERS[name]()
    chat = Chat(tokenizer)
    ids = encode(tokenizer, "8 higher")

    assert chat.decode([*ids, *chat.stop_token_ids]) == "8 higher"
    assert chat.decode(ids) == "8 higher"
    assert chat.decode(chat.stop_token_ids) == chat.decode([]) == ""


def test_a_reply_in_unusual_tokens_has_the_same_text():
    tokenizer = byte_level_tokenizer()
    usual = encode(tokenizer, "higher")
    unusual = [encode(tokenizer, letter)[0] for letter in "higher"]
    assert len(unusual) > len(usual)

    assert Chat(tokenizer).decode(unusual) == Chat(tokenizer).decode(usual) == "higher"


def test_tokenizer_without_template_is_refused():
    with pytest.raises(ValueError, match=r"no chat template; add chat_template\.jinja"):
        Chat(byte_level_tokenizer(None))


def test_tokenizer_without_stop_token_is_refused():
    with pytest.raises(ValueError, match=r"no stop token; set .*eos_token"):
        Chat(byte_level_tokenizer(stop=None))


@pytest.mark.parametrize("template", [NO_STOP_AFTER_REPLY, OTHER_STOP_AFTER_REPLY])
def test_template_that_ends_replies_without_the_stop_token_is_refused(template):
    with pytest.raises(ValueError, match=r"stop token '<\|im_end\|>'; set .*eos_token"):
        Chat(byte_level_tokenizer(template))


def test_template_that_drops_earlier_turns_is_refused():
    with pytest.raises(ValueError, match="does not render replies and observations in order"):
        Chat(byte_level_tokenizer(LAST_TURN_ONLY))
