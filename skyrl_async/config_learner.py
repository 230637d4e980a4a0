"""The section of the learner group, and what rules out what in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from skyrl_async.config_section import Section


class LearnerSection(Section):
    """The learner group."""

    num_ranks: int = Field(default=1, ge=1)
    """Processes that share each batch; more than one needs runtime=ray."""
    shard_ranks: int | None = Field(default=None, ge=1)
    """Ranks that share one copy of the weights (FSDP2); without it all, 1 keeps a copy on each."""
    sequence_ranks: int = Field(default=1, ge=1)
    """Ranks that share the tokens of a microbatch, for sequences too long for one of them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What the learner computes on; with cuda each rank has a GPU of its own."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; the trained weights and the optimizer stay in float32."""
    float32_head: bool = False
    """Compute the logits in float32 also with compute_dtype=bfloat16."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Over packed sequences: flash-attn, PyTorch's kernel (both on GPUs in bfloat16), or any."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them."""
    offload: bool = False
    """Keep weights, gradients and the optimizer's state in host memory between their uses."""
    groups_per_step: int = Field(default=16, ge=1)
    """Groups in the batch of one learner step."""
    num_minibatches: int = Field(default=2, ge=1)
    """Optimizer steps per pass over the batch."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over the batch."""
    tokens_per_microbatch: int = Field(default=8192, ge=1)
    """Tokens of one forward and backward pass."""
    num_threads: int = Field(default=1, ge=1)
    """Torch threads of a learner rank."""
    step_timeout_s: float = Field(default=600, gt=0)
    """A learner step that takes longer ends the run."""

    @property
    def num_shard_ranks(self) -> int:
        """Ranks that share one copy of the weights."""
        return self.num_ranks if self.shard_ranks is None else self.shard_ranks


def learner_problems(learner: LearnerSection, *, critic_kind: str, advantage: str) -> Iterator[str]:
    """Yield one line for each set of values that cannot work together."""
    for name in ("shard_ranks", "sequence_ranks"):
        value = getattr(learner, name)
        if value is not None and learner.num_ranks % value:
            yield (
                f"learner.{name}={value}: must divide learner.num_ranks={learner.num_ranks}; "
                "change one of them"
            )
    if learner.sequence_ranks > 1 and critic_kind != "none":
        yield (
            f"learner.sequence_ranks={learner.sequence_ranks}, critic.kind={critic_kind}: a critic "
            "needs all tokens of a sequence on one rank; set learner.sequence_ranks=1 or an "
            "algorithm without critic"
        )
    sharded = learner.num_shard_ranks > 1 or learner.sequence_ranks > 1
    if advantage == "optimal_off_policy_baseline" and (sharded or learner.offload):
        yield (
            f"algorithm.advantage={advantage}, learner.num_ranks={learner.num_ranks}: the gradient "
            "of each trajectory needs all weights on one rank; set learner.shard_ranks=1, "
            "learner.sequence_ranks=1 and learner.offload=false"
        )
    if advantage == "optimal_off_policy_baseline" and learner.compute_dtype != "float32":
        yield (
            f"algorithm.advantage={advantage}, learner.compute_dtype={learner.compute_dtype}: the "
            "gradient of each trajectory is taken of the float32 weights; set "
            "learner.compute_dtype=float32"
        )
    if learner.device == "cuda":
        return
    if learner.offload:
        yield "learner.offload=true: learner.device=cpu has everything in host memory; remove it"
    if learner.attention in ("flash", "varlen"):
        yield (
            f"learner.attention={learner.attention}: needs learner.device=cuda; set "
            "learner.attention=auto"
        )
