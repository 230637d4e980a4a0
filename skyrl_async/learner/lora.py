"""Low-rank adapters: training a few numbers beside frozen weights, with the `peft` library.

::

    model = add_adapter(load_model(source), LoraSettings(rank=16, alpha=32))
    fill_adapter(model.named_parameters(), seed=0)
    learner = Learner(model, ...)                 # trains what requires gradients: the adapter
    with reference_policy(model):                 # the model as it was before training
        ...
    dict(merged_parameters(model))                # what an engine runs, under its own names
    dict(adapter_parameters(model))               # the adapter alone
    save_adapter(model, folder)                   # PeftModel.from_pretrained(base, folder)
    merged_model(model).save_pretrained(folder)   # AutoModelForCausalLM.from_pretrained(folder)

`peft` puts a layer around each adapted one, so the parameters of ``model`` have names of their own:
``q_proj.base_layer.weight`` for ``q_proj.weight``, and ``q_proj.lora_A.default.weight``.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skyrl_async.learner.lora_merge import PEFT_PREFIX, SIDE_A, SIDE_B, MergedWeight
from skyrl_async.learner.sharding import local_rows

_ADAPTER = "default"
_INNER = {f".lora_A.{_ADAPTER}.weight": SIDE_A, f".lora_B.{_ADAPTER}.weight": SIDE_B}
_BASE = ".base_layer."
_FUSED = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
"""Names that `peft` takes for fused experts in a model that has some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Which weights are adapted, and how.

    There is no dropout: it would make the learner's logprobs random.

    Attributes:
        rank: of each adapter.
        alpha: the adapter's product is multiplied by ``alpha / rank``.
        target_modules: names, or ends of names, of the linear layers to adapt; empty for all of
            the decoder (without the experts of a mixture).

    Raises:
        ValueError: if a number is out of range.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}; leave LoRA out for 0")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha must be > 0 and finite, got {self.alpha}")

    @property
    def scale(self) -> float:
        """What the product of an adapter's sides is multiplied by."""
        return self.alpha / self.rank


def add_adapter(model: Any, settings: LoraSettings) -> Any:
    """Freeze a causal LM and put adapters beside its linear layers, in place; return it.

    The adapters have no values yet that one may rely on: see :func:`fill_adapter`. They are in
    float32 at least, whatever the type of the weights.

    Args:
        model: a plain `transformers` causal LM, with weights or on the ``meta`` device.
        settings: which layers, and how.

    Raises:
        ValueError: if there is no such layer, or one that cannot be adapted.
        RuntimeError: if `peft` is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RuntimeError(
            f"lora.rank={settings.rank} needs the library peft ({error}); install it with "
            "pip install 'skyrl_async[lora]', or set lora.rank=0"
        ) from error
    targets = list(settings.target_modules) or _linear_names(model)
    config = LoraConfig(
        r=settings.rank,
        # The library multiplies by lora_alpha / r, which any number can be.
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config._name_or_path or None,
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    _check_layers(model)
    for _, parameter in adapter_parameters(model):
        wide = torch.promote_types(parameter.dtype, torch.float32)
        parameter.data = parameter.data.to(wide)
    return model


def _linear_names(model: Any) -> list[str]:
    """Return the last parts of the names of the decoder's linear layers.

    Raises:
        ValueError: if it has none.
    """
    decoder = model.get_decoder()
    names = {
        name.rpartition(".")[2]
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    if any(parameter.ndim == 3 for parameter in decoder.parameters()):
        names -= _FUSED
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.Linear layers to adapt; set lora.rank=0"
        )
    return sorted(names)


def _check_layers(model: Any) -> None:
    from peft.tuners.lora import Linear, LoraLayer

    outside = (model.get_output_embeddings(), model.get_input_embeddings())
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        linear = isinstance(module, Linear) and isinstance(module.get_base_layer(), nn.Linear)
        if linear and all(module is not other for other in outside):
            continue
        raise ValueError(
            f"lora.target_modules: {name!r} of {type(model).__name__} is no linear layer of its "
            "own in the decoder (an embedding, the head, or the experts of a mixture); leave it out"
        )


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if not has_adapter(model):
        # Loading the library takes seconds, and it may not be there.
        return iter(())
    from peft.tuners.lora import LoraLayer

    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


def has_adapter(model: nn.Module) -> bool:
    """Return whether :func:`add_adapter` changed the model."""
    return any(adapter_name(name) is not None for name, _ in model.named_parameters())


def base_name(name: str) -> str | None:
    """Return the plain model's name for a parameter of an adapted one; None for an adapter's own.

    The names of a plain model are returned as they are.
    """
    if adapter_name(name) is not None:
        return None
    return name.replace(_BASE, ".")


def adapter_name(name: str) -> str | None:
    """Return the `peft` file's name for a parameter of an adapter; None for any other."""
    for inner, side in _INNER.items():
        if name.endswith(inner):
            return PEFT_PREFIX + name.removesuffix(inner) + side
    return None


@torch.no_grad()
def fill_adapter(named_parameters: Iterable[tuple[str, Tensor]], *, seed: int) -> None:
    """Write the initial values of all adapters: they change nothing yet, as ``B`` is zero.

    ``A`` is uniform in ``±1 / sqrt(in_features)``. The values depend on seed and name alone, so
    that they are the same on any number of ranks.

    Args:
        named_parameters: of an adapted model, whole or sharded by rows; all others are left alone.
        seed: of the values.
    """
    for name, parameter in named_parameters:
        published = adapter_name(name)
        if published is None:
            continue
        rows, first = local_rows(parameter)
        if published.endswith(SIDE_B):
            rows.zero_()
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(published.encode()) ^ seed)
        bound = parameter.shape[1] ** -0.5
        whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        rows.copy_(whole[first : first + rows.shape[0]])


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor | MergedWeight]]:
    """Yield all parameters of the plain model, by its own names and in its order.

    Those with an adapter are merged when they are written, from the values that they have then.

    Args:
        model: with adapters; a plain one has its own parameters.
    """
    layers = {f"{name}{_BASE}weight": layer for name, layer in _layers(model)}
    for name, parameter in model.named_parameters():
        base = base_name(name)
        if base is None:
            continue
        layer = layers.get(name)
        if layer is None:
            yield base, parameter
            continue
        yield (
            base,
            MergedWeight(
                base=parameter.detach(),
                lora_a=layer.lora_A[_ADAPTER].weight.detach(),
                lora_b=layer.lora_B[_ADAPTER].weight.detach(),
                scale=layer.scaling[_ADAPTER],
            ),
        )


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of all adapters, by the names of the `peft` library's files."""
    for name, parameter in model.named_parameters():
        published = adapter_name(name)
        if published is not None:
            yield published, parameter


def adapter_config(model: Any) -> dict[str, Any]:
    """Return what the `peft` library's ``adapter_config.json`` holds."""
    config: dict[str, Any] = model.peft_config[_ADAPTER].to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


@contextlib.contextmanager
def reference_policy(model: nn.Module) -> Iterator[None]:
    """Run ``model`` without its adapters inside the context: the policy before training.

    The parameters stay as they are, also which of them require gradients.
    """
    layers = [layer for _, layer in _layers(model)]
    scales = [layer.scaling[_ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[_ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_ADAPTER] = scale


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapters in the format of the `peft` library.

    Args:
        model: with adapters, not sharded.
        folder: made if it is not there.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter_parameters(model)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    model.peft_config[_ADAPTER].save_pretrained(str(folder))


def merged_model(model: Any) -> Any:
    """Return a plain model with merged weights, for ``save_pretrained`` alone.

    It shares the memory of the weights without adapters.
    """
    weights = {
        name: weight.tensor() if isinstance(weight, MergedWeight) else weight.detach()
        for name, weight in merged_parameters(model)
    }
    return plain_model(model, weights)


def plain_model(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return a model like ``model``, without adapters and not sharded, that has these weights.

    Args:
        model: only its class and configuration are used.
        weights: of all parameters; of tied ones, once.

    Raises:
        RuntimeError: if some are missing.
    """
    with torch.device("meta"):
        plain = _class_of(model)(model.config)
    # What the checkpoint called its weights; files then have these names again.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        plain._weight_conversions = conversions
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    left = [name for name, p in plain.named_parameters() if p.is_meta]
    if left:
        raise RuntimeError(f"no weights for {left[0]!r} ({len(left)} in all)")
    return plain


def _class_of(model: Any) -> Any:
    """Return the model's own class, which FSDP derives another one from."""
    from torch.distributed.fsdp import FSDPModule

    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
