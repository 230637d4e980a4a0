"""What is checked and shown before a run: everything that needs no process to be started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skyrl_async.checkpoint import read_run_state
from skyrl_async.config import Config
from skyrl_async.config_keys import show
from skyrl_async.config_lora import served_module_problems
from skyrl_async.config_optimizer import check_schedule
from skyrl_async.coordination.run_state import RunState
from skyrl_async.coordination.staleness import max_admitted
from skyrl_async.metrics.trackers import check_trackers
from skyrl_async.model_folder import ModelShape, is_hub_name, read_model_folder
from skyrl_async.resume import find_resume
from skyrl_async.rollout.engine_launch import MIN_SGLANG_VERSION, check_extra_args
from skyrl_async.run_folder import DEFAULT_ROOT, check_run_folder

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_BUILT_IN_VOCABULARY = 64
_WINDOW_IGNORED_BY_SGLANG = ("mistral", "mixtral")


def find_problems(config: Config, *, root: Path = DEFAULT_ROOT) -> list[str]:
    """Return one line for everything that would keep the run from starting.

    The environment's module is imported and one environment is made; the run's folder is not.

    Args:
        config: of the run.
        root: where run folders without a name of their own go.
    """

    def environment() -> None:
        # Gymnasium takes a while to import, so only a valid configuration pays for it.
        from skyrl_async.environments.registry import check_environment

        check_environment(config.environment.name, config.environment.options)

    checks: tuple[tuple[str, Callable[[], object]], ...] = (
        (f"environment.name={config.environment.name}: ", environment),
        (f"model.path={config.model.path}: ", lambda: _check_model(config)),
        ("", lambda: _check_loss(config)),
        ("lora: ", lambda: _check_lora(config)),
        ("", lambda: check_schedule(config.optimizer, total_steps=config.optimizer_steps)),
        ("optimizer.groups: ", lambda: _check_groups(config)),
        (f"distillation.teacher={config.distillation.teacher}: ", lambda: _check_teacher(config)),
        ("", lambda: _check_engine(config)),
        ("", lambda: check_trackers(config.logging.trackers)),
        ("", lambda: check_run_folder(config, root=root)),
        ("", lambda: _check_resume(config)),
    )
    return list(_failures(checks))


def find_sft_problems(config: Config, *, root: Path = DEFAULT_ROOT) -> list[str]:
    """Return one line for everything but the demonstrations that would keep one from starting.

    Args:
        config: of the supervised fine-tuning.
        root: where run folders without a name of their own go.
    """
    checks: tuple[tuple[str, Callable[[], object]], ...] = (
        (f"model.path={config.model.path}: ", lambda: _check_model(config)),
        ("lora: ", lambda: _check_lora(config)),
        ("optimizer.groups: ", lambda: _check_groups(config)),
        ("", lambda: check_run_folder(config, root=root)),
    )
    return list(_failures(checks))


def _failures(checks: Iterable[tuple[str, Callable[[], object]]]) -> Iterator[str]:
    for prefix, check in checks:
        try:
            check()
        except ValueError as error:
            yield f"{prefix}{error}"


def describe_run(config: Config, *, root: Path = DEFAULT_ROOT) -> str:
    """Return what the run will do, with its sizes, in a few lines.

    Raises:
        ValueError: if the model's folder cannot be read; see :func:`find_problems`.
    """
    lines = (
        ("run folder", config.run.dir or f"{root / config.run.name}-<time>"),
        ("checkpoints", _checkpoints(config)),
        ("training", _training(config)),
        ("environment", _environment(config)),
        ("policy", _policy(config)),
        ("workers", _workers(config)),
        ("staleness", _staleness(config)),
        ("memory", _memory(config)),
    )
    return "\n".join(f"{name:<13}{text}" for name, text in lines)


def _check_model(config: Config) -> None:
    shape = _model_shape(config)
    context = config.engine.context_length
    if shape.max_positions is not None and context > shape.max_positions:
        raise ValueError(
            f"engine.context_length={context} is more than the model's {shape.max_positions} "
            "positions; lower it"
        )
    if config.engine.kind == "sglang":
        _check_served(config, shape)


def _check_served(config: Config, shape: ModelShape) -> None:
    """Refuse what a server runs, but computes otherwise than the learner."""
    engine, window = config.engine, shape.sliding_window
    ignores_window = shape.model_type in _WINDOW_IGNORED_BY_SGLANG
    if ignores_window and window is not None and engine.context_length > window:
        raise ValueError(
            f"engine.context_length={engine.context_length} is more than the sliding window of "
            f"{window} tokens, which SGLang ignores in {shape.model_type} models, so that its "
            f"logprobs would be of another policy; set at most {window}, or engine.kind=embedded"
        )
    if shape.model_type == "gemma2" and engine.device == "cpu":
        raise ValueError(
            "engine.device=cpu: SGLang's attention on a CPU leaves out the softcap of gemma2 "
            "models, so that its logprobs would be of another policy; set engine.kind=embedded"
        )


def _check_resume(config: Config) -> None:
    try:
        resume = find_resume(config)
    except ValueError:
        return  # what is wrong with the checkpoint itself is said with the folder
    if resume is None:
        return
    try:
        RunState.from_json(read_run_state(resume.checkpoint))
    except ValueError as error:
        raise ValueError(
            f"run.resume={config.run.resume}: {resume.checkpoint} was not written by "
            f"launchers/run.py ({error}); launchers/export.py makes a model.path of its weights"
        ) from None


def _checkpoints(config: Config) -> str:
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep
    text = f"every {every} steps and at the end, the newest {keep} kept" if every else "none"
    resume = find_resume(config)
    if resume is None:
        return text
    return f"{text}; goes on from step {resume.manifest.step} in {resume.checkpoint}"


def _check_loss(config: Config) -> None:
    algorithm = config.algorithm
    if not algorithm.loss_options and ":" not in algorithm.loss:
        return
    # Loading torch takes a while, so only those who set a loss pay for it.
    from skyrl_async.algorithms.loss_by_name import check_loss

    check_loss(algorithm.loss, algorithm.loss_options)


def _check_lora(config: Config) -> None:
    if not config.lora.rank:
        return
    if find_spec("peft") is None:
        raise ValueError(
            f"lora.rank={config.lora.rank} needs the library peft; install it with "
            "pip install 'skyrl_async[lora]', or set lora.rank=0"
        )
    if not _is_known(config):
        return
    trained = _trained_parameters(config)
    if config.engine.kind == "sglang" and config.lora.publish == "adapter":
        adapted = (name.rpartition(".lora_")[0] for name, _ in trained if ".lora_" in name)
        for problem in served_module_problems(adapted):
            raise ValueError(problem)


def _is_known(config: Config) -> bool:
    """Return whether the model can be looked at without a download."""
    return config.model.path is None or not is_hub_name(config.model.path)


def _trained_parameters(config: Config) -> list[tuple[str, Any]]:
    """Return names and shapes of what the learner trains.

    Raises:
        ValueError: if there is no causal LM, or its layers cannot be adapted.
    """
    # Loading torch takes a while, so only those who set groups or adapters pay for it.
    from skyrl_async.learner.policy import skeleton
    from skyrl_async.runtime.settings import lora_settings, policy_source

    model, lora = skeleton(policy_source(config)), lora_settings(config)
    if lora is not None:
        from skyrl_async.learner.lora import add_adapter

        add_adapter(model, lora)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _check_groups(config: Config) -> None:
    if not config.optimizer.groups or not _is_known(config):
        return
    from skyrl_async.learner.optimizer import OptimizerSettings, build_optimizer
    from skyrl_async.runtime.settings import parameter_groups

    settings = OptimizerSettings(groups=parameter_groups(config.optimizer))
    build_optimizer(_trained_parameters(config), settings)


def _check_teacher(config: Config) -> None:
    path = config.distillation.teacher
    if path is None or is_hub_name(path):
        return
    shape, context = read_model_folder(path), config.engine.context_length
    if shape.max_positions is not None and context > shape.max_positions:
        raise ValueError(
            f"it has {shape.max_positions} positions, fewer than engine.context_length={context}; "
            "lower that"
        )
    if _is_known(config):
        # Loading tokenizers takes a while, so only those who have a teacher pay for it.
        from skyrl_async.learner.teacher import check_teacher
        from skyrl_async.runtime.settings import policy_source, teacher_source

        check_teacher(policy_source(config), teacher_source(config))


def _check_engine(config: Config) -> None:
    engine = config.engine
    check_extra_args(engine.sglang_args)
    if engine.kind == "embedded" and engine.device == "cuda" and config.runtime == "local":
        _check_cuda()
    if engine.python is None:
        return
    if not os.access(engine.python, os.X_OK) or Path(engine.python).is_dir():
        raise ValueError(
            f"engine.python={engine.python}: no such interpreter; make an environment with SGLang: "
            f"launchers/sglang_cpu/install.sh {Path(engine.python).parent.parent} without a GPU, "
            f"pip install 'sglang>={MIN_SGLANG_VERSION}' in one of its own with a GPU"
        )


def _check_cuda() -> None:
    # Loading torch takes a while, so only those who ask for a GPU of this process pay for it.
    import torch

    if not torch.cuda.is_available():
        raise ValueError("engine.device=cuda: torch sees no CUDA device here; set cpu")


def _model_shape(config: Config) -> ModelShape:
    """Return the sizes of the policy; unknown for a model that is still on the hub."""
    model = config.model
    if model.path is not None:
        return ModelShape() if is_hub_name(model.path) else read_model_folder(model.path)
    width, head = model.hidden_size, model.hidden_size // model.num_heads
    attention = 3 * width * width + 2 * head
    layer = attention + 6 * width * width + 2 * width
    return ModelShape(
        num_parameters=2 * _BUILT_IN_VOCABULARY * width + model.num_layers * layer + width,
        num_layers=model.num_layers,
        kv_width=width // 2,
    )


def _training(config: Config) -> str:
    learner, group_size = config.learner, config.rollout.group_size
    text = (
        f"{config.run.steps} steps of {learner.groups_per_step} groups x {group_size} = "
        f"{learner.groups_per_step * group_size} trajectories, "
        f"{learner.num_minibatches * learner.num_epochs} optimizer steps each"
    )
    stops = (
        ("run.max_seconds", config.run.max_seconds),
        ("run.stop_at_eval_reward", config.run.stop_at_eval_reward),
    )
    given = [f"{key}={show(value)}" for key, value in stops if value is not None]
    return text + (f"; stops early at {', '.join(given)}" if given else "")


def _environment(config: Config) -> str:
    environment = config.environment
    options = ", ".join(f"{key}={value!r}" for key, value in environment.options.items())
    place = (
        "inside the actor"
        if environment.in_process
        else f"{environment.num_processes} subprocesses per actor"
    )
    return f"{environment.name}({options}), at most {environment.max_turns} turns, {place}"


def _policy(config: Config) -> str:
    count = _model_shape(config).num_parameters
    size = "size unknown" if count is None else f"{count / 1e6:.3g} M parameters"
    path = config.model.path
    name = "built-in" if path is None else path
    checked = " (on the hub, not checked)" if path is not None and is_hub_name(path) else ""
    return f"{name}{checked}, {size}, {config.model.dtype}"


def _workers(config: Config) -> str:
    ranks, actors = config.learner.num_ranks, config.rollout.num_actors
    engine = config.engine
    at_once = f"{engine.max_concurrent} sequences at once"
    counts = f"{_count(ranks, 'learner rank')}, {_count(actors, 'rollout actor')}"
    if engine.kind == "embedded":
        counts += f" with {at_once}"
    elif engine.urls:
        counts += f", {_count(len(engine.urls), 'SGLang server')} given with {at_once} each"
    else:
        servers = _count(engine.num_engines, "SGLang server")
        counts += f", {servers} to start, on {engine.device}, with {at_once} each"
    if simulated := config.simulate.parts:
        counts += f"; only simulated: {' and '.join(simulated)}"
    if config.runtime == "local":
        return f"in this process: {counts}"
    address = config.cluster.address
    place = "a local Ray" if address is None else f"Ray at {address}"
    cpus = config.cluster.learner_cpus * ranks + config.cluster.actor_cpus * actors
    if engine.kind == "sglang":
        cpus += config.cluster.engine_cpus * (len(engine.urls) or engine.num_engines)
    return f"on {place}: {counts}; {cpus:g} CPUs reserved"


def _staleness(config: Config) -> str:
    lag = config.lab.exact_lag
    if lag is not None:
        return f"exactly {_count(lag, 'version')} after the first {lag} steps, in lock step"
    return (
        f"at most {_count(config.staleness.max, 'version')}, rule {config.staleness.rule}; at most "
        f"{_max_admitted(config)} groups admitted and not released"
    )


def _max_admitted(config: Config) -> int:
    return max_admitted(
        groups_per_step=config.learner.groups_per_step,
        max_staleness=config.staleness.max,
        max_times_sampled=config.replay.max_times_sampled,
    )


def _memory(config: Config) -> str:
    return "about " + ", ".join(_memory_parts(config)) + "; activations and libraries come on top"


def _memory_parts(config: Config) -> Iterator[str]:
    shape, size = _model_shape(config), _DTYPE_BYTES[config.model.dtype]
    if shape.num_parameters is not None:
        if config.lora.rank:
            yield f"{_bytes(size * shape.num_parameters)} and the adapters per learner rank"
        else:
            # Weights, gradients and the two moments of AdamW.
            yield f"{_bytes(4 * size * shape.num_parameters)} per learner rank"
        # The weights in use, those of the next version, and those of an evaluation.
        yield f"{_bytes(3 * size * shape.num_parameters)} of weights per actor"
        if config.lab.exact_lag:
            older = config.lab.exact_lag * size * shape.num_parameters
            yield f"{_bytes(older)} of older weights beside the learner"
    if shape.num_layers is not None and shape.kv_width is not None:
        tokens = config.engine.max_concurrent * config.engine.context_length
        cache = 2 * size * shape.num_layers * shape.kv_width * tokens
        yield f"up to {_bytes(cache)} of KV cache per actor"
    groups = _max_admitted(config) * config.largest_group_bytes
    yield f"up to {_bytes(min(groups, config.replay.capacity_bytes))} of trajectories"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
