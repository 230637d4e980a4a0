"""What any kind of training needs of a policy: forward passes, gradients over ranks, one update."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skyrl_async.learner.optimizer import (
    OptimizerSettings,
    build_optimizer,
    clip_gradients,
    rate_at,
    set_rate,
)
from skyrl_async.learner.packing import Microbatch, empty_microbatch
from skyrl_async.learner.rank_group import RankGroup


class PolicyTrainer:
    """A module with its optimizer, on one rank of the learner group.

    ::

        trainer.zero_grad()
        loss = torch.zeros(())
        for microbatch in trainer.matched(microbatches):
            part = loss_of(trainer.module(microbatch))   # a share of the whole minibatch's loss
            part.backward()
            loss += part.detach()
        grad_norm = trainer.apply(loss)                  # None: not finite, nothing changed

    Args:
        module: in its place in memory; its parameters that require gradients are trained.
        settings: of the optimizer.
        ranks: of the learner group.
        is_sharded: whether its gradients come summed over the ranks, and in parts.
        flat_rows: whether microbatches have flat rows.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: OptimizerSettings,
        *,
        ranks: RankGroup,
        is_sharded: bool = False,
        flat_rows: bool = False,
    ) -> None:
        self.module = module
        self.ranks = ranks
        self.is_sharded = is_sharded
        self.optimizer_steps = 0
        self.rate_factor = 1.0
        # Names as the model has them, which is what users know.
        named = [
            (name.removeprefix("model."), p)
            for name, p in module.named_parameters()
            if p.requires_grad
        ]
        self.parameters = [p for _, p in named]
        self.optimizer = build_optimizer(named, settings)
        self._settings = settings
        self._empty_layout: Literal["tree", "flat"] = "flat" if flat_rows else "tree"
        self._whole = [p for p in self.parameters if not hasattr(p, "placements")]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the trained parameters."""
        return self.parameters[0].dtype

    @property
    def learning_rate(self) -> float:
        """Of the first group of parameters, in the newest optimizer step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def matched(self, microbatches: Sequence[Microbatch]) -> Iterator[Microbatch]:
        """Yield the microbatches on the device, and empty ones while other ranks have more.

        The ranks of a sharded module must run it equally often, as every run gathers its weights.
        """
        count = len(microbatches)
        if self.is_sharded:
            count = int(self.ranks.max_(torch.tensor(count)))
        for number in range(count):
            if number < len(microbatches):
                microbatch = microbatches[number]
            else:
                microbatch = empty_microbatch(dtype=self.dtype, layout=self._empty_layout)
            yield microbatch.to(self.ranks.device)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def apply(self, loss: Tensor, *, rate_scale: float = 1.0) -> float | None:
        """Clip and take one optimizer step, and return the gradient's norm before clipping.

        Returns None, and changes nothing, if loss or gradient is not finite. All ranks decide
        alike, because both are sums over the ranks.

        Args:
            loss: this rank's part; replaced by the sum over the ranks.
            rate_scale: multiplies the learning rate of this step alone.
        """
        self.ranks.sum_gradients(self._whole)
        self.ranks.sum_(loss)
        norm = clip_gradients(self.parameters, self._settings.max_grad_norm)
        if not (torch.isfinite(norm) and torch.isfinite(loss)):
            self.zero_grad()
            return None
        factor = rate_at(self.optimizer_steps, self._settings)
        set_rate(self.optimizer, factor * rate_scale * self.rate_factor)
        self.optimizer.step()
        self.optimizer_steps += 1
        return float(norm)

    def save_state(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Return copies of this rank's trained weights and moments."""
        weights = [p.detach().clone() for p in self.parameters]
        return weights, copy.deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def restore_state(self, weights: Sequence[Tensor], optimizer: dict[str, Any]) -> None:
        """Go back to what :meth:`save_state` returned, which stays as it is."""
        for parameter, saved in zip(self.parameters, weights, strict=True):
            parameter.copy_(saved)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer))
