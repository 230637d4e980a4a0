"""AdamW with groups of parameters, the schedule of its learning rate, and gradient clipping.

``N`` is the number of parameters. Steps are optimizer steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Schedule = Literal["constant", "linear", "cosine"]

_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that are trained differently from the rest.

    Attributes:
        match: regular expression, searched in the parameters' names.
        learning_rate_factor: of the learning rate; 0 leaves the parameters as they are.
        weight_decay: of these parameters, vectors included; None leaves it as it would be.

    Raises:
        ValueError: if the expression cannot be compiled or a number is negative.
    """

    match: str
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(
                f"match={self.match!r}: not a regular expression ({error}); escape special "
                "characters with a backslash"
            ) from None
        for name in ("learning_rate_factor", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{name}={value} of the group {self.match!r}: must be finite and >= 0"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """How to update parameters.

    Attributes:
        learning_rate: after warm-up, before the schedule lowers it.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
        max_grad_norm: gradients are scaled down to this norm.
        warmup_steps: steps of linear warm-up.
        schedule: of the learning rate after warm-up.
        total_steps: at which a schedule reaches its end; needed by all but ``constant``.
        min_rate_fraction: of the learning rate, at the end of a schedule.
        no_decay_on_vectors: norm weights and biases are not decayed.
        groups: the first one that matches a name holds for it.

    Raises:
        ValueError: if a number is out of range, or a schedule has no end after warm-up.
    """

    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    schedule: Schedule = "constant"
    total_steps: int | None = None
    min_rate_fraction: float = 0.0
    no_decay_on_vectors: bool = True
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and > 0")
        for name in ("weight_decay", "warmup_steps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)}: must be finite and >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: both must be in [0, 1)")
        if not 0 <= self.min_rate_fraction <= 1:
            raise ValueError(f"min_rate_fraction={self.min_rate_fraction}: must be in [0, 1]")
        if self.schedule == "constant":
            return
        if self.total_steps is None or self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps={self.total_steps}: schedule={self.schedule} needs more steps than "
                f"warmup_steps={self.warmup_steps}; lower those or use schedule=constant"
            )


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerSettings
) -> torch.optim.AdamW:
    """Return AdamW over all parameters that require gradients.

    Each of its groups has a ``base_rate``, its learning rate before :func:`set_rate`. Devices and
    types that have a fused update use it.

    Args:
        named_parameters: as of a module; parameters that FSDP2 has sharded too.
        settings: how.

    Raises:
        ValueError: if nothing is trained, or no trained parameter is left for a group.
    """
    groups = _grouped(named_parameters, settings)
    parameters = [p for group in groups for p in group["params"]]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=all(map(_has_fused_update, parameters)),
    )


def rate_at(optimizer_step: int, settings: OptimizerSettings) -> float:
    r"""Return the factor of the learning rate for the step after ``optimizer_step`` steps.

    With ``w`` warm-up steps, ``n`` steps in all, the fraction ``m`` at the end and the progress
    ``p = (s - w) / (n - w)``, limited to 1, the factor at step ``s`` (from 0) is

    .. math::

        (s + 1) / w \;\; (s < w), \qquad
        m + (1 - m)(1 - p) \;\; \text{(linear)}, \qquad
        m + (1 - m)\tfrac12 (1 + \cos \pi p) \;\; \text{(cosine)}

    so that the last step still has a rate above the one at the end.

    Args:
        optimizer_step: steps taken so far.
        settings: with the schedule.

    Raises:
        ValueError: if the number of steps is negative.

    Source: cosine, without restarts: Loshchilov and Hutter, SGDR (arXiv 1608.03983).
    """
    if optimizer_step < 0:
        raise ValueError(f"optimizer_step={optimizer_step}: must be >= 0")
    warmup = settings.warmup_steps
    if optimizer_step < warmup:
        return (optimizer_step + 1) / warmup
    if settings.schedule == "constant" or settings.total_steps is None:
        return 1.0
    progress = min(1.0, (optimizer_step - warmup) / (settings.total_steps - warmup))
    left = 1 - progress
    if settings.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.min_rate_fraction + (1 - settings.min_rate_fraction) * left


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its ``base_rate``.

    Raises:
        ValueError: if the factor is negative or not finite.
    """
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"factor={factor}: must be finite and >= 0")
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to ``max_norm`` and return their norm before that.

    With sharded parameters all ranks of their mesh call it, and get the norm over all shards.

    Args:
        parameters: those without a gradient are skipped; sharded and whole ones may be mixed.
        max_norm: of all gradients as one vector.

    Returns:
        Scalar on the gradients' device, not finite if any gradient is not.
    """
    by_mesh: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(_mesh(parameter), []).append(parameter)
    if not by_mesh:
        return torch.zeros(())
    norms = [_norm([p.grad for p in part if p.grad is not None]) for part in by_mesh.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of gradients of one mesh, over all their shards."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _mesh(parameter: torch.nn.Parameter) -> Any:
    """Return the mesh that holds the shards; None for a whole tensor. Lists must not mix them."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def _grouped(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """Return AdamW's groups, in the order of first appearance.

    They depend on names and shapes, not on rates and decays, so that a saved optimizer fits others.
    """
    members: dict[tuple[int | None, bool, Any], list[torch.nn.Parameter]] = {}
    names: list[str] = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        names.append(name)
        own = next((i for i, g in enumerate(settings.groups) if re.search(g.match, name)), None)
        key = (own, parameter.ndim <= 1, _mesh(parameter))
        members.setdefault(key, []).append(parameter)
    if not names:
        raise ValueError("no parameter requires a gradient; nothing would be trained")
    used = {own for own, _, _ in members}
    for i, group in enumerate(settings.groups):
        if i not in used:
            raise ValueError(
                f"match={group.match!r}: matches none of the {len(names)} trained parameters that "
                f"no group before it has ({', '.join(names[:3])}, ...); correct or remove that "
                "group"
            )
    return [
        {"params": parameters, **_rate_and_decay(own, settings, vectors=vectors)}
        for (own, vectors, _), parameters in members.items()
    ]


def _rate_and_decay(
    own: int | None, settings: OptimizerSettings, *, vectors: bool
) -> dict[str, float]:
    rate = settings.learning_rate
    decay = 0.0 if vectors and settings.no_decay_on_vectors else settings.weight_decay
    if own is not None:
        group = settings.groups[own]
        rate *= group.learning_rate_factor
        decay = decay if group.weight_decay is None else group.weight_decay
    return {"lr": rate, "base_rate": rate, "weight_decay": decay}


def _has_fused_update(parameter: torch.nn.Parameter) -> bool:
    floating = parameter.is_floating_point() and parameter.element_size() > 1
    return floating and parameter.device.type in _FUSED_DEVICES
