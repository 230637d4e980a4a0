"""What can be known of a Hugging Face model folder without loading it."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX_SUFFIX = ".index.json"
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken"),
)
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model; what is unknown is None.

    Attributes:
        num_parameters: of all weights.
        num_layers: with a KV cache.
        kv_width: key-value heads times the size of a head.
        max_positions: tokens that it can see.
        model_type: as `transformers` names its architecture.
        sliding_window: tokens that layers with a window can see.
    """

    num_parameters: int | None = None
    num_layers: int | None = None
    kv_width: int | None = None
    max_positions: int | None = None
    model_type: str | None = None
    sliding_window: int | None = None


def is_hub_name(path: str) -> bool:
    """Return whether ``path`` can only be the name of a model on the hub."""
    if Path(path).exists() or not _HUB_NAME.fullmatch(path):
        return False
    return "/" not in path or not Path(path).parent.exists()


def read_model_folder(path: str) -> ModelShape:
    """Check that a folder holds a model with tokenizer and weights, and return its sizes.

    The values of the weights are not read.

    Args:
        path: of the folder.

    Raises:
        ValueError: naming what is missing or broken.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise ValueError(
            f"{what}; give a folder with config.json, tokenizer and safetensors, or the name of a "
            "model on the hub"
        )
    config = _read_json(folder / "config.json", remedy="save the model with save_pretrained")
    if "model_type" not in config:
        raise ValueError("config.json has no model_type, so it is no Hugging Face model")
    _check_tokenizer(folder)
    return _shape(config, num_parameters=_count_parameters(folder))


def _read_json(file: Path, *, remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file.name} is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} is broken ({error}); {remedy}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file.name} is broken (not a mapping); {remedy}")
    return data


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(
            f"no tokenizer (one of {', '.join(_TOKENIZERS)}); save it there with save_pretrained"
        )
    if any((folder / name).exists() for name in _CHAT_TEMPLATES):
        return
    settings = folder / "tokenizer_config.json"
    remedy = "save the tokenizer with save_pretrained"
    if not settings.exists() or not _read_json(settings, remedy=remedy).get("chat_template"):
        raise ValueError("the tokenizer has no chat template; add chat_template.jinja")


def _count_parameters(folder: Path) -> int | None:
    """Return the number of parameters, None if only loading would tell.

    Raises:
        ValueError: if weights are missing or incomplete.
    """
    for name in _WEIGHTS:
        index = folder / f"{name}{_INDEX_SUFFIX}"
        if (folder / name).is_file():
            shards = [name]
        elif index.is_file():
            weight_map = _read_json(index, remedy="copy the model again").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index.name} is broken (no weight_map); copy the model again")
            shards = sorted({str(shard) for shard in weight_map.values()})
        else:
            continue
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"weights are missing: {', '.join(missing)}; copy the model again")
        if not name.endswith(".safetensors"):
            return None
        return sum(_count_in_file(folder / shard) for shard in shards)
    raise ValueError(
        f"no weights ({' or '.join(_WEIGHTS)}, or shards with an index); save the model there"
    )


def _count_in_file(file: Path) -> int:
    """Return the number of parameters in a safetensors file, from its header."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER_BYTES + 1
        header_bytes = opened.read(length) if length <= _MAX_HEADER_BYTES else b""
    try:
        header = json.loads(header_bytes)
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        count = sum(math.prod(entry["shape"]) for entry in tensors)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(
            f"{file.name} is not in safetensors format (a Git LFS pointer, or cut off?); copy it "
            "again"
        ) from None
    if size != needed:
        raise ValueError(
            f"{file.name} has {size} bytes, but its header promises {needed}; copy it again"
        )
    return count


def _shape(config: Mapping[str, Any], *, num_parameters: int | None) -> ModelShape:
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config

    def size(*names: str) -> int | None:
        return next((v for v in map(text.get, names) if type(v) is int and v > 0), None)

    num_heads = size("num_attention_heads", "n_head")
    kv_heads = size("num_key_value_heads") or num_heads
    hidden = size("hidden_size", "n_embd")
    head_dim = size("head_dim") or (hidden // num_heads if hidden and num_heads else None)
    return ModelShape(
        num_parameters=num_parameters,
        num_layers=size("num_hidden_layers", "n_layer"),
        kv_width=kv_heads * head_dim if kv_heads and head_dim else None,
        max_positions=size("max_position_embeddings", "n_positions"),
        model_type=str(text.get("model_type") or config["model_type"]),
        sliding_window=size("sliding_window"),
    )
