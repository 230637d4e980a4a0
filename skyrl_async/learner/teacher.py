"""The teacher of a distillation: whether it speaks the policy's language."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from skyrl_async.learner.policy import PolicySource, load_tokenizer, vocabulary_size


def token_ids_hash(vocabulary: Mapping[str, int]) -> str:
    """Return the SHA-256 of which token has which id, in hexadecimal digits.

    Args:
        vocabulary: from token to id, as ``tokenizer.get_vocab()``.
    """
    digest = hashlib.sha256()
    for token, index in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def check_teacher(policy: PolicySource, teacher: PolicySource) -> None:
    """Check that a token id means the same to both, and that the teacher has all of them.

    Rows of an embedding beyond the tokenizer's ids, which some models have as padding, may differ:
    no engine samples them.

    Raises:
        ValueError: naming the first difference, or that one of them cannot be loaded.
    """
    own = load_tokenizer(policy).get_vocab()
    other = load_tokenizer(teacher).get_vocab()
    if token_ids_hash(own) != token_ids_hash(other):
        raise ValueError(
            f"its tokenizer is not the policy's: {_difference(own, other)}; logprobs of tokens can "
            "only be compared if every id means the same, so take a model of the same family"
        )
    needed = max(own.values()) + 1
    size = vocabulary_size(teacher)
    if size < needed:
        raise ValueError(
            f"it has {size} token ids, but the tokenizer has {needed}; take the model that the "
            "tokenizer belongs to"
        )


def _difference(own: Mapping[str, int], other: Mapping[str, int]) -> str:
    """Say how two vocabularies differ, by their size or their first different id."""
    if len(own) != len(other):
        return f"{len(other)} tokens in place of {len(own)}"
    mine = {index: token for token, index in own.items()}
    theirs = {index: token for token, index in other.items()}
    index = min(i for i in mine.keys() | theirs.keys() if mine.get(i) != theirs.get(i))
    return f"id {index} is {theirs.get(index)!r} in place of {mine.get(index)!r}"
