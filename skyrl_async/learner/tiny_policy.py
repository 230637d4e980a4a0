"""The small built-in policy: a Qwen3-architecture model with random weights and its tokenizer.

Everything is made from a configuration, offline and deterministically: the same arguments give the
same weights in every process. It is meant for the embedded engine on a CPU, for tests and for
benchmarks; ``model.path`` takes a real model instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

STOP_TOKEN = "<end>"
MAX_NUMBER = 20
BUILT_IN_VOCABULARY_SIZE = 64
"""Rows of the built-in policy's embedding; more than its tokenizer uses."""

_SPECIALS = ("<pad>", "<unk>", "<system>", "<user>", "<assistant>", STOP_TOKEN)
_WORDS = (
    *(
        "guess",
        "a",
        "number",
        "from",
        "to",
        "is",
        "the",
        "what",
        "largest",
        "smallest",
        "of",
        "and",
    ),
    *("higher", "lower", "correct", "invalid", "solved", "failed", "left", "try", "again"),
    *("answer", "yes", "no", "+", "-", "*", "=", "?", ",", "."),
)
VOCABULARY = (*_SPECIALS, *(str(n) for n in range(MAX_NUMBER + 1)), *_WORDS)

_CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} <end>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: fewer than 64 words, split at white space and punctuation.

    Numbers from 0 to 20 are one token each, any other word is ``<unk>``; a reply ends with
    ``<end>``.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"<\w+>|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token=STOP_TOKEN,
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_model(
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    vocab_size: int = BUILT_IN_VOCABULARY_SIZE,
    max_position_embeddings: int = 4096,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """Return a Qwen3 causal LM in float32 whose weights depend on the arguments alone.

    Args:
        hidden_size: width; 64 is about 0.1 M parameters, 128 about 0.4 M.
        num_layers: decoder layers.
        num_heads: attention heads; half as many key-value heads.
        vocab_size: at least as large as the tokenizer's vocabulary.
        max_position_embeddings: context length in tokens.
        seed: of the weights.

    Raises:
        ValueError: if the sizes do not fit each other.
    """
    import torch
    from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    if hidden_size % num_heads or num_heads % 2:
        raise ValueError(
            f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}, an even number"
        )
    if vocab_size < len(VOCABULARY):
        raise ValueError(f"vocab_size must be >= {len(VOCABULARY)}, got {vocab_size}")
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_position_embeddings,
        # Wider than usual: Adam's steps are as large at the start, so narrow weights are noise.
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(STOP_TOKEN),
        pad_token_id=VOCABULARY.index("<pad>"),
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()
