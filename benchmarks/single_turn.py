"""Single-turn training against synchronous TRL: seconds to reward 0.9 and trajectories per second.

Task: name the largest of three digits. Each step trains 16 prompts x 16 trajectories; the model is
the built-in one, width 128 with 2 layers (0.3 M parameters); temperature 1, replies of at most 2
tokens; AdamW at 1e-3 with one optimizer step per batch. All of that is TRL's side too.

    python benchmarks/single_turn.py                                # this repository alone
    python benchmarks/single_turn.py --trl-python trl/bin/python    # both in turns, same machine

Our side is a run of ``launchers/run.py``. The clock of a run starts with its first admitted task,
TRL's with ``on_train_begin``; both exclude imports, and ours includes the first weights' way to the
engine. The reward is that of the 256 trajectories which a step trains, on both sides;
`seconds_to_reward_0_9` is the end of the first step where it reaches 0.9, and
`seconds_to_reward_0_9_over_8_steps` asks for it over the last 8 steps (2,048 trajectories), which a
batch of easy tasks cannot reach. Rates leave out the first 10 steps. All figures are medians over
the seeds (weights, tasks and sampling).

The settings are the fastest that were found on 2 cores:

* `runtime=ray` with one actor and one learner. In one process (`--runtime local`) the learner's
  thread and the episodes share the interpreter's lock, and a step takes about a third longer.
* `staleness.max=2`: the actor never waits for weights; with 0 it idles for half of a step.
* `learner.num_minibatches=1`: as TRL does; a second optimizer step costs a pass for the proximal
  logprobs, and learns less from the same seconds.
* `algorithm.entropy_coefficient=0.02`: without it, most seeds settle at 0.87. TRL has its default.
* one thread per process, no TensorBoard and no console.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from report import finish

from skyrl_async.environments.largest_digit import LargestDigit
from skyrl_async.environments.tasks import TaskSource

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, GROUP_SIZE = 16, 16
REWARD = 0.9
WARMUP_STEPS = 10
TARGET_SECONDS, TARGET_RATE = 6.9, 1980.0
"""Synchronous TRL 1.16.0 on 2 cores, nothing else running."""

OVERRIDES = (
    "environment.name=largest_digit",
    "environment.in_process=true",
    "model.hidden_size=128",
    "model.num_layers=2",
    "sampling.temperature=1",
    "sampling.max_tokens=2",
    f"rollout.group_size={GROUP_SIZE}",
    "rollout.num_actors=1",
    f"learner.groups_per_step={PROMPTS}",
    "learner.num_minibatches=1",
    "learner.num_epochs=1",
    "optimizer.learning_rate=1e-3",
    "algorithm.entropy_coefficient=0.02",
    "engine.max_concurrent=1024",
    "evaluation.num_tasks=0",
    "logging.tensorboard=false",
    "logging.console=off",
)

Steps = list[dict[str, float]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less than a minute, rougher figures")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--trl-python", type=Path, help="interpreter with trl: measure it too")
    parser.add_argument("--runtime", choices=("ray", "local"), help="default: ray, quick: local")
    parser.add_argument("--staleness-max", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of each run; default 120, quick: 40")
    parser.add_argument("--seeds", type=int, help="runs of each side; default 3, quick: 1")
    args = parser.parse_args()
    args.runtime = args.runtime or ("local" if args.quick else "ray")
    args.steps = args.steps or (40 if args.quick else 120)
    args.seeds = args.seeds or (1 if args.quick else 3)
    return args


def run_ours(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Do one run; return its figures and its share of time by part."""
    place = folder / f"seed{seed}"
    command = [
        *(sys.executable, str(ROOT / "launchers" / "run.py"), *OVERRIDES),
        f"run.dir={place}",
        f"run.steps={args.steps}",
        f"runtime={args.runtime}",
        f"staleness.max={args.staleness_max}",
        f"seed={seed}",
    ]
    started = time.perf_counter()
    run_text(command, threads=1)
    metrics = [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]
    steps = [{"time_s": m["time_s"], "reward": m["reward/trained_mean"]} for m in metrics]
    return {
        **figures(steps),
        "seed": seed,
        "total_seconds": time.perf_counter() - started,
        "staleness_mean": mean(metrics, "staleness/mean"),
        "sampled_tokens_per_trajectory": mean(metrics, "rollout/generated_tokens_mean"),
        "time": {
            name.removeprefix("idle/").removesuffix("_fraction"): mean(metrics, name)
            for name in metrics[-1]
            if name.startswith("idle/")
        },
    }


def run_peer(
    python: Path,
    script: Path,
    *options: str,
    seed: int,
    steps: int,
    folder: Path,
    max_seconds: float = 300,
) -> dict[str, Any]:
    """Run the script of another trainer on the same tasks; return its figures.

    Args:
        python: interpreter that has the trainer.
        script: takes the arguments of ``peers/peer_task.py``, and prints its result.
        options: of the script.
        seed: of weights, tasks and sampling.
        steps: optimizer steps of 256 trajectories.
        folder: for the tasks' file.
        max_seconds: after which training ends early.

    Raises:
        RuntimeError: if the script fails, or trains on other prompts than ours.
    """
    rows, tasks = first_tasks(seed, PROMPTS * steps), folder / f"tasks{seed}.json"
    tasks.write_text(json.dumps(rows))
    command = [
        *(str(python), str(script), *options, "--tasks", str(tasks), "--steps", str(steps)),
        *("--seed", str(seed), "--threads", "2", "--max-seconds", str(max_seconds)),
    ]
    answer = json.loads(run_text(command, threads=2).splitlines()[-1])
    check_prompt(answer.pop("first_prompt_token_ids"), rows)
    return {**figures(answer.pop("steps")), "seed": seed, **answer}


def first_tasks(seed: int, count: int) -> list[dict[str, Any]]:
    """Return the questions that a run with this seed asks first, with their answers."""
    source, environment = TaskSource("largest_digit", seed=seed), LargestDigit()
    tasks = []
    for _ in range(count):
        question, _ = environment.reset(seed=source.next().seed)
        answer = max(int(word) for word in question.split() if word.isdecimal())
        tasks.append({"prompt": question, "answer": answer})
    return tasks


def check_prompt(theirs: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to compare if the prompt's tokens are those of none of the tasks on our side."""
    from skyrl_async.learner.tiny_policy import build_tiny_tokenizer
    from skyrl_async.rollout.chat import Chat

    chat = Chat(build_tiny_tokenizer())
    if list(theirs) not in [list(chat.prompt((), row["prompt"])) for row in rows]:
        raise RuntimeError(f"the prompt {list(theirs)} is none of ours")


def run_text(command: Sequence[str], *, threads: int) -> str:
    environment = {**os.environ, "CI": "true", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr[-4000:]}")
    return done.stdout


def figures(steps: Steps) -> dict[str, Any]:
    """Return seconds to the reward, and trajectories per second after the warm-up."""
    if len(steps) < WARMUP_STEPS + 2:
        raise RuntimeError(f"only {len(steps)} steps within the time limit")
    trained = PROMPTS * GROUP_SIZE
    steady = steps[WARMUP_STEPS:]
    seconds = steady[-1]["time_s"] - steady[0]["time_s"]
    durations = sorted(b["time_s"] - a["time_s"] for a, b in itertools.pairwise(steady))
    return {
        "seconds_to_reward_0_9": seconds_to_reward(steps, over=1),
        "seconds_to_reward_0_9_over_8_steps": seconds_to_reward(steps, over=8),
        "trajectories_per_s": trained * (len(steady) - 1) / seconds,
        "step_ms_p20": 1e3 * durations[len(durations) // 5],
        "reward_last_10_steps": sum(s["reward"] for s in steps[-10:]) / 10,
        "steps": len(steps),
    }


def seconds_to_reward(steps: Steps, *, over: int) -> float | None:
    """Return when the mean of ``over`` steps first reaches the reward; None if never."""
    for end in range(over, len(steps) + 1):
        if sum(s["reward"] for s in steps[end - over : end]) / over >= REWARD:
            return steps[end - 1]["time_s"]
    return None


def mean(metrics: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [m[name] for m in metrics[WARMUP_STEPS:] if m.get(name) is not None]
    return sum(values) / max(len(values), 1)


def middle(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the median; None if it is a run that never got there."""
    never = float("inf")
    value = median(never if run[name] is None else run[name] for run in runs)
    return None if value == never else value


def print_row(side: str, run: Mapping[str, Any]) -> None:
    first, eighth = (run[f"seconds_to_reward_0_9{x}"] for x in ("", "_over_8_steps"))
    print(
        f"{side:<6}{run['seed']:>5}{run['trajectories_per_s']:>9.0f}{run['step_ms_p20']:>13.1f}"
        f"{'-' if first is None else f'{first:.1f}':>10}"
        f"{'-' if eighth is None else f'{eighth:.1f}':>13}{run['reward_last_10_steps']:>9.3f}",
        flush=True,
    )


def print_time(run: Mapping[str, Any]) -> None:
    """Print where the wall time of each role goes, as shares of a step."""
    print("\nwhere the time of a step goes (seed 0)")
    roles: dict[str, list[str]] = {}
    for name, share in run["time"].items():
        role, part = name.split("/")
        roles.setdefault(role, []).append(f"{part} {share:.0%}")
    for role, parts in roles.items():
        print(f"  {role:<9}{', '.join(parts)}")


def main() -> None:
    started = time.perf_counter()
    args = arguments()
    load = os.getloadavg()[0]
    ours: list[dict[str, Any]] = []
    trl: list[dict[str, Any]] = []
    print(
        f"{'':<6}{'seed':>5}{'traj/s':>9}{'step ms p20':>13}{'s to 0.9':>10}{'over 8 steps':>13}"
        f"{'at end':>9}"
    )
    with tempfile.TemporaryDirectory() as name:
        for seed in range(args.seeds):
            ours.append(run_ours(args, seed, Path(name)))
            print_row("ours", ours[-1])
            if args.trl_python is not None:
                trl.append(
                    run_peer(
                        *(args.trl_python, ROOT / "benchmarks" / "trl_single_turn.py"),
                        **{"seed": seed, "steps": args.steps, "folder": Path(name)},
                    )
                )
                print_row("TRL", trl[-1])
    print_time(ours[0])
    result: dict[str, Any] = {
        "runtime": args.runtime,
        "staleness_max": args.staleness_max,
        "load_at_start": load,
        **headline(ours),
        "runs": ours,
    }
    if trl:
        result["trl"] = {**headline(trl), "runs": trl}
    finish("single_turn", result, misses(result), started, args.output)


def headline(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    names = (
        *("seconds_to_reward_0_9", "seconds_to_reward_0_9_over_8_steps"),
        *("trajectories_per_s", "step_ms_p20", "reward_last_10_steps"),
    )
    return {name: middle(runs, name) for name in names}


def misses(result: Mapping[str, Any]) -> list[str]:
    """Return the targets missed: those of a quiet machine, or TRL in the same run."""
    seconds, rate = TARGET_SECONDS, TARGET_RATE
    if "trl" in result:
        seconds = result["trl"]["seconds_to_reward_0_9"] or float("inf")
        rate = result["trl"]["trajectories_per_s"]
    out = []
    reached = result["seconds_to_reward_0_9"]
    if reached is None or reached >= seconds:
        out.append(f"reward {REWARD} after {reached} s, target below {seconds:.1f} s")
    if result["trajectories_per_s"] <= rate:
        out.append(f"{result['trajectories_per_s']:.0f} trajectories/s, target above {rate:.0f}")
    return out


if __name__ == "__main__":
    main()
