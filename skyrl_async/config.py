"""The run's configuration: one tree of frozen models that refuses unknown keys and bad values.

Components take plain values, never this tree. Loading (YAML, ``base:``, dotted overrides, all
errors at once) is in :mod:`skyrl_async.config_loading`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from skyrl_async.config_algorithm import (
    AlgorithmSection,
    CorrectionSection,
    CriticSection,
    FiltersSection,
    GuardSection,
    KlSection,
    algorithm_problems,
)
from skyrl_async.config_distillation import DistillationSection, distillation_problems
from skyrl_async.config_engine import EngineSection, engine_problems
from skyrl_async.config_inert import inert_problems
from skyrl_async.config_lab import LabSection, lab_problems
from skyrl_async.config_learner import LearnerSection, learner_problems
from skyrl_async.config_logging import LoggingSection
from skyrl_async.config_lora import LoraSection, lora_problems
from skyrl_async.config_optimizer import OptimizerSection, optimizer_problems
from skyrl_async.config_section import Section
from skyrl_async.config_sft import SftSection
from skyrl_async.config_simulate import SimulateSection, simulate_problems
from skyrl_async.types import BYTES_PER_TOKEN, RECORD_OVERHEAD_BYTES


class RunSection(Section):
    """How long the run lasts and what it leaves behind."""

    name: str = Field(default="number_guess", pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the run; its folder is runs/<name>-<time> unless run.dir says otherwise."""
    dir: str | None = None
    """Folder of the run; one that holds a run already is refused, unless that is resumed."""
    resume: str = "never"
    """never; auto: go on in run.dir if a run is there; or a run or checkpoint to go on from."""
    steps: int = Field(default=240, ge=1)
    """Learner steps to train."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Stop after this many seconds of training, whichever comes first."""
    stop_at_eval_reward: float | None = None
    """Stop when an evaluation reaches this mean reward."""
    dashboard: bool = False
    """Serve a live page of the run, and its metrics for Prometheus."""
    dashboard_host: str = "127.0.0.1"
    """Address that it listens on; it asks nobody for a password."""
    dashboard_port: int = Field(default=0, ge=0, lt=65536)
    """Port of it; 0 takes a free one."""


class CheckpointSection(Section):
    """What is kept, so that a run can go on after its process has ended."""

    every_steps: int = Field(default=100, ge=0)
    """Learner steps between checkpoints; there is one more at the end. 0 writes none."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    timeout_s: float = Field(default=600, gt=0)
    """A checkpoint that takes longer to write ends the run."""
    interrupt_timeout_s: float = Field(default=2, ge=0)
    """Time that an interrupted run has to end its step and write a checkpoint; 0 writes none."""


class ClusterSection(Section):
    """Where runtime=ray runs."""

    address: str | None = None
    """Address of a running Ray cluster, or auto; without it a local one is started."""
    learner_cpus: float = Field(default=1, ge=0)
    """CPUs that Ray reserves for each learner rank."""
    learner_gpus: float = Field(default=1, ge=0)
    """GPUs that Ray reserves for each learner rank with learner.device=cuda."""
    actor_cpus: float = Field(default=1, ge=0)
    """CPUs that Ray reserves for each rollout actor."""
    engine_cpus: float = Field(default=1, ge=0)
    """CPUs that Ray reserves for each SGLang server."""
    spread: bool = True
    """Place rollout actors and SGLang servers on as many nodes as possible."""
    startup_timeout_s: float = Field(default=120, gt=0)
    """Every worker must be ready after this many seconds."""


class ModelSection(Section):
    """The policy: a built-in small one, or any Hugging Face causal LM."""

    path: str | None = None
    """Folder or hub name of a causal LM with its tokenizer; without it the built-in policy."""
    hidden_size: int = Field(default=64, ge=8)
    """Width of the built-in policy."""
    num_layers: int = Field(default=2, ge=1)
    """Layers of the built-in policy."""
    num_heads: int = Field(default=4, ge=2)
    """Attention heads of the built-in policy; an even number."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the engine and in the learner."""


class EnvironmentSection(Section):
    """What is played."""

    name: str = "number_guess"
    """Registered name of the environment, or module:Class."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment."""
    in_process: bool = False
    """Run a synchronous environment inside the actor: fast, but it can block or end the actor."""
    num_processes: int = Field(default=2, ge=1)
    """Subprocesses per actor that play synchronous environments."""
    step_timeout_s: float = Field(default=30, gt=0)
    """Deadline of one reset or step."""
    episode_timeout_s: float = Field(default=600, gt=0)
    """Deadline of one episode, generation included."""
    max_turns: int = Field(default=16, ge=1)
    """Replies per episode; then it is truncated."""
    max_observation_chars: int = Field(default=20_000, ge=1)
    """A longer observation ends the episode with overlong_observation."""


class SamplingSection(Section):
    """How training samples its replies (evaluation is greedy)."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits."""
    max_tokens: int = Field(default=4, ge=1)
    """Tokens per reply, the stop token included."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Must be 1 in training: importance weights need the whole vocabulary."""
    top_k: int = Field(default=0, ge=0)
    """Must be 0 in training: importance weights need the whole vocabulary."""


class RolloutSection(Section):
    """The actors that play episodes."""

    num_actors: int = Field(default=1, ge=1)
    """Rollout actors; each has its own engine if engine.kind is embedded."""
    group_size: int = Field(default=16, ge=1)
    """Trajectories per task; 1 needs an estimator that compares no members."""
    max_groups_per_actor: int = Field(default=1024, ge=1)
    """Groups that one actor plays at once."""


class StalenessSection(Section):
    """The bound on how old a trained token may be, in policy versions."""

    max: int = Field(default=2, ge=0)
    """Largest staleness of a trained token; 0 is synchronous training."""
    rule: Literal["mask", "drop", "pace"] = "mask"
    """At the bound, old tokens leave the loss, old groups are dropped, or training waits."""


class ReplaySection(Section):
    """The buffer between actors and learner."""

    capacity_groups: int | None = Field(default=None, ge=1)
    """Groups kept at most; without it, as many as admission allows."""
    capacity_bytes: int = Field(default=1 << 30, ge=1)
    """Bytes kept at most; must exceed groups_per_step times the largest possible group."""
    selector: Literal["fifo", "uniform"] = "fifo"
    """Oldest first, or at random."""
    max_times_sampled: int = Field(default=1, ge=1)
    """Learner steps that may use one group."""


class WeightSyncSection(Section):
    """How new weights reach the engines."""

    transport: Literal["collective", "disk"] = "collective"
    """collective: torch.distributed, one group per engine; disk: safetensors in a folder."""
    bucket_bytes: int = Field(default=1 << 20, ge=1 << 10)
    """Bytes sent at once; one that fits into a core's cache is received and checked there."""
    timeout_s: float = Field(default=30, gt=0)
    """An engine that takes longer to receive one version loses its group."""
    max_bytes_per_s: float | None = Field(default=None, gt=0)
    """Send to each engine no faster, to leave the network to others; without it, no limit."""


class EvaluationSection(Section):
    """Greedy evaluation on held-out tasks."""

    every_steps: int = Field(default=40, ge=0)
    """Learner steps between evaluations; 0 evaluates only at the end."""
    num_tasks: int = Field(default=100, ge=0)
    """Held-out tasks; 0 never evaluates."""
    timeout_s: float = Field(default=300, gt=0)
    """An evaluation that takes longer ends the run."""


class Config(Section):
    """Everything about one run."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of weights, tasks and sampling."""
    runtime: Literal["ray", "local"] = "ray"
    """ray: workers are Ray actors; local: everything in this process, Ray is not imported."""
    run: RunSection = RunSection()
    checkpoint: CheckpointSection = CheckpointSection()
    cluster: ClusterSection = ClusterSection()
    model: ModelSection = ModelSection()
    environment: EnvironmentSection = EnvironmentSection()
    sampling: SamplingSection = SamplingSection()
    rollout: RolloutSection = RolloutSection()
    engine: EngineSection = EngineSection()
    staleness: StalenessSection = StalenessSection()
    replay: ReplaySection = ReplaySection()
    algorithm: AlgorithmSection = AlgorithmSection()
    correction: CorrectionSection = CorrectionSection()
    kl: KlSection = KlSection()
    distillation: DistillationSection = DistillationSection()
    critic: CriticSection = CriticSection()
    filters: FiltersSection = FiltersSection()
    guard: GuardSection = GuardSection()
    optimizer: OptimizerSection = OptimizerSection()
    lora: LoraSection = LoraSection()
    learner: LearnerSection = LearnerSection()
    weight_sync: WeightSyncSection = WeightSyncSection()
    evaluation: EvaluationSection = EvaluationSection()
    lab: LabSection = LabSection()
    simulate: SimulateSection = SimulateSection()
    sft: SftSection = SftSection()
    logging: LoggingSection = LoggingSection()

    @property
    def largest_group_bytes(self) -> int:
        """Bytes of the largest group that the limits allow."""
        tokens = self.engine.context_length
        return self.rollout.group_size * (RECORD_OVERHEAD_BYTES + BYTES_PER_TOKEN * tokens)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.run.steps * self.learner.num_minibatches * self.learner.num_epochs

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        problems = (
            *self._sampling_problems(),
            *self._pace_problems(),
            *self._replay_problems(),
            *self._model_problems(),
            *self._run_problems(),
            *engine_problems(
                self.engine, runtime=self.runtime, transport=self.weight_sync.transport
            ),
            *learner_problems(
                self.learner,
                critic_kind=self.critic.kind,
                advantage=self.algorithm.advantage,
            ),
            *lora_problems(
                self.lora,
                engine_kind=self.engine.kind,
                weight_load=self.engine.weight_load,
                critic_kind=self.critic.kind,
            ),
            *optimizer_problems(self.optimizer),
            *simulate_problems(
                self.simulate,
                engine_kind=self.engine.kind,
                num_ranks=self.learner.num_ranks,
                lora_publish=self.lora.publish,
                guard_enabled=self.guard.enabled,
                timeout_s=self.weight_sync.timeout_s,
            ),
            *lab_problems(
                self.lab,
                engine_kind=self.engine.kind,
                max_staleness=self.staleness.max,
                max_times_sampled=self.replay.max_times_sampled,
                guard_enabled=self.guard.enabled,
                resume=self.run.resume,
                learner=self.learner,
            ),
            *distillation_problems(
                self.distillation,
                algorithm=self.algorithm,
                correction=self.correction,
                kl=self.kl,
                critic=self.critic,
                filters=self.filters,
            ),
            *algorithm_problems(
                self.algorithm,
                group_size=self.rollout.group_size,
                correction=self.correction,
                kl=self.kl,
                critic=self.critic,
                filters=self.filters,
                max_staleness=self.staleness.max,
                context_length=self.engine.context_length,
            ),
            *inert_problems(
                self.algorithm,
                correction=self.correction,
                kl=self.kl,
                critic=self.critic,
                filters=self.filters,
            ),
        )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    # One line for each set of values that cannot work together: every value as path=value, then the
    # limit and the remedy. The loader finds by these paths where the values were set.

    def _sampling_problems(self) -> Iterator[str]:
        if self.sampling.top_p < 1 or self.sampling.top_k > 0:
            yield (
                f"sampling.top_p={self.sampling.top_p}, sampling.top_k={self.sampling.top_k}: "
                "training needs 1 and 0, because importance weights are only right over the whole "
                "vocabulary"
            )
        if self.sampling.max_tokens >= self.engine.context_length:
            yield (
                f"sampling.max_tokens={self.sampling.max_tokens}: must be below "
                f"engine.context_length={self.engine.context_length}; raise that or lower this"
            )

    def _pace_problems(self) -> Iterator[str]:
        if self.staleness.rule != "pace":
            return
        if self.replay.max_times_sampled > 1:
            yield (
                f"replay.max_times_sampled={self.replay.max_times_sampled}: "
                "staleness.rule=pace uses every group once; set 1 or staleness.rule=mask"
            )
        if self.replay.selector != "fifo":
            yield (
                f"replay.selector={self.replay.selector}: staleness.rule=pace takes the oldest "
                "first; set fifo or staleness.rule=mask"
            )

    def _replay_problems(self) -> Iterator[str]:
        batch, group_size = self.learner.groups_per_step, self.rollout.group_size
        needed = batch * self.largest_group_bytes
        if self.replay.capacity_bytes <= needed:
            yield (
                f"replay.capacity_bytes={self.replay.capacity_bytes}: must exceed {needed}, or "
                f"actors and learner would wait for each other: learner.groups_per_step={batch} "
                f"times the largest group of {self.largest_group_bytes} bytes "
                f"(rollout.group_size={group_size}, "
                f"engine.context_length={self.engine.context_length})"
            )
        capacity = self.replay.capacity_groups
        if capacity is not None and capacity < batch:
            yield (
                f"replay.capacity_groups={capacity}: must be at least "
                f"learner.groups_per_step={batch}, or no batch would ever be complete"
            )
        if self.learner.num_minibatches > batch * group_size:
            yield (
                f"learner.num_minibatches={self.learner.num_minibatches}: a batch has only "
                f"{batch * group_size} trajectories (learner.groups_per_step={batch} times "
                f"rollout.group_size={group_size}); set at most that"
            )

    def _model_problems(self) -> Iterator[str]:
        model = self.model
        if model.path is not None:
            return
        if model.num_heads % 2 or model.hidden_size % (2 * model.num_heads):
            yield (
                f"model.hidden_size={model.hidden_size}, model.num_heads={model.num_heads}: the "
                "number of heads must be even and the width a multiple of twice that number, for "
                "example 64 and 4"
            )

    def _run_problems(self) -> Iterator[str]:
        if self.runtime == "local" and self.learner.num_ranks > 1:
            yield (
                f"learner.num_ranks={self.learner.num_ranks}: runtime=local has one rank; "
                "set 1 or runtime=ray"
            )
        if self.runtime == "local" and self.cluster.address is not None:
            yield (
                f"cluster.address={self.cluster.address}: runtime=local starts no Ray; "
                "set runtime=ray or remove the address"
            )
        if self.run.resume == "auto" and self.run.dir is None:
            yield (
                "run.resume=auto: run.dir is not set, so every run has a new folder; set run.dir "
                "to the folder of the run to go on with"
            )
        if self.evaluation.num_tasks == 0 and self.run.stop_at_eval_reward is not None:
            yield (
                f"run.stop_at_eval_reward={self.run.stop_at_eval_reward}: "
                "evaluation.num_tasks=0 never evaluates; set it above 0"
            )
