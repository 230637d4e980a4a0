"""What a stopped and a killed SGLang server cost the others, the learner, and the trajectories.

Two parts, with real servers on a CPU:

* stopped in the middle of a transfer (SIGSTOP): two servers with a worker beside each, and a
  publisher, as in a run; the sender is throttled so that a transfer takes about a second. Figures:
  when the other engine runs the version, against its own time without a fault, and how long the
  learner's thread was held up by publishing the next versions;
* killed during generation (SIGKILL): a whole run of ``launchers/run.py`` with two servers. Figures:
  trajectories lost, seconds until the dead engine gets no more requests, and seconds from the
  restarted server's first answer until it plays again, with verified weights.

    python benchmarks/engine_faults.py --sglang-python .sglang/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from report import finish

from skyrl_async.config import Config
from skyrl_async.config_loading import load_config
from skyrl_async.runtime.engine_worker import EngineWorker, server_names
from skyrl_async.runtime.learner_worker import LearnerWorker
from skyrl_async.weight_sync.publisher import EngineEvent, EngineStatus, WeightPublisher

ROOT = Path(__file__).resolve().parents[1]
OTHER_ENGINE_LIMIT_S = 2.0
BACK_LIMIT_S = 15.0
LOST_LIMIT_S = 5.0
TRANSFER_S = 1.0
STARTED_S = 240.0

MODEL = ("model.hidden_size=448", "model.num_layers=7", "model.num_heads=8")
SERVED = ("engine.kind=sglang", "engine.num_engines=2", "runtime=local")


class Publishing:
    """A learner that publishes by hand, and when each engine ran what."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.worker = LearnerWorker(config)
        self.worker.start()
        self.worker.open_publisher(host="127.0.0.1", folder=folder / "weights")
        self.loaded_s: dict[tuple[str, int], float] = {}
        self.lost: list[str] = []
        self.publisher: WeightPublisher = self.worker._publisher
        self.publisher._on_event = self._note

    def _note(self, event: EngineEvent) -> None:
        if event.status is EngineStatus.LOADED:
            self.loaded_s[event.engine_id, event.policy_version] = time.monotonic()
        else:
            self.lost.append(event.engine_id)

    def publish(self) -> tuple[int, float, float]:
        """Return the version, when, and how long the calling thread was held up."""
        started = time.monotonic()
        self.worker._learner.policy_version += 1
        self.worker.publish_newest()
        return self.worker._learner.policy_version, started, time.monotonic() - started

    async def wait(self, engine_id: str, version: int, *, timeout_s: float) -> float:
        """Return when the engine ran the version."""
        end = time.monotonic() + timeout_s
        while (engine_id, version) not in self.loaded_s:
            if time.monotonic() > end:
                raise RuntimeError(f"{engine_id} did not load version {version}")
            await asyncio.sleep(0.005)
        return self.loaded_s[engine_id, version]


async def stopped_mid_transfer(python: Path, folder: Path, *, repeats: int) -> dict[str, Any]:
    """Return how the other engine and the learner fared while one server was stopped."""
    config = load_config(
        None,
        [*SERVED, *MODEL, f"engine.python={python}", "engine.load_timeout_s=6"],
    )
    publishing = Publishing(config, folder)
    size_bytes = publishing.worker._snapshots.layout.size_bytes
    config = load_config(
        None,
        [
            *(*SERVED, *MODEL, f"engine.python={python}", "engine.load_timeout_s=6"),
            f"weight_sync.max_bytes_per_s={size_bytes / TRANSFER_S}",
        ],
    )
    publishing.worker._config = config
    names = server_names(config)
    workers = [EngineWorker(config, index=i, folder=folder) for i in range(len(names))]
    try:
        await asyncio.gather(*(worker.start() for worker in workers))
        for name, worker in zip(names, workers, strict=True):
            await worker.connect(publishing.worker.open_pair(name))
        publishing.worker.publish_newest()
        for name in names:
            await publishing.wait(name, 0, timeout_s=30)
        usual = []
        for _ in range(repeats):
            version, started, _ = publishing.publish()
            usual.append(max([await publishing.wait(n, version, timeout_s=30) for n in names]))
            usual[-1] -= started
        victim = workers[0]._supervisor.status.server
        version, started, held_s = publishing.publish()
        await asyncio.sleep(TRANSFER_S / 2)
        os.killpg(victim.pid, signal.SIGSTOP)
        other_s = await publishing.wait(names[1], version, timeout_s=30) - started
        held = [held_s]
        for _ in range(5):
            held.append(publishing.publish()[2])
            await asyncio.sleep(0.2)
        return {
            "usual_update_s": sum(usual) / len(usual),
            "other_update_s": other_s,
            "other_delay_s": other_s - sum(usual) / len(usual),
            "learner_held_up_s": max(held),
            "megabytes": size_bytes / 1e6,
        }
    finally:
        publishing.worker.close()
        await asyncio.gather(*(worker.close() for worker in workers), return_exceptions=True)


def killed_in_a_run(python: Path, folder: Path, *, kills: int) -> dict[str, Any]:
    """Return what a run with two servers lost when one was killed, and when that one was back."""
    place = folder / "run"
    command = [
        *(sys.executable, str(ROOT / "launchers" / "run.py"), *SERVED),
        *(f"engine.python={python}", f"run.dir={place}", "run.steps=100000", "staleness.max=2"),
        *("learner.groups_per_step=4", "rollout.group_size=8", "sampling.max_tokens=4"),
        *("environment.in_process=true", "evaluation.num_tasks=0", "logging.tensorboard=false"),
    ]
    run = subprocess.Popen(
        command,
        env={**os.environ, "CI": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    out_s, back_s = [], []
    try:
        _until(run, lambda: _steps(place) >= 3, STARTED_S, "three steps")
        for _ in range(kills):
            joined, left = len(_times(place, "joined")), len(_times(place, "left"))
            killed = time.time()
            os.killpg(_server(place), signal.SIGKILL)
            _until(run, partial(_more, place, "left", left), 30, "it left the pool")
            out_s.append(_times(place, "left")[-1] - killed)
            _until(run, partial(_more, place, "joined", joined), STARTED_S, "it joined again")
            back_s.append(_times(place, "joined")[-1] - _times(place, "is up")[-1])
            steps = _steps(place) + 2
            _until(run, partial(_trained, place, steps), STARTED_S, "training goes on")
    finally:
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    summary = json.loads((place / "summary.json").read_text())
    lost = sum(summary["dropped"].values()) + sum(summary["failed_members"].values())
    return {
        "kills": kills,
        "trajectories_lost": lost,
        "trajectories_trained": summary["trajectories_trained"],
        "staleness_observed_max": summary["staleness_observed_max"],
        "out_of_pool_s": max(out_s),
        "back_after_healthy_s": max(back_s),
    }


def _until(run: Any, condition: Any, timeout_s: float, what: str) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if run.poll() is not None:
            raise RuntimeError(f"the run ended before {what}:\n{run.stdout.read()[-4000:]}")
        if time.monotonic() > end:
            raise RuntimeError(f"waited {timeout_s} s until {what}")
        time.sleep(0.02)


def _steps(place: Path) -> int:
    path = place / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _trained(place: Path, steps: int) -> bool:
    return _steps(place) > steps


def _more(place: Path, event: str, count: int) -> bool:
    return len(_times(place, event)) > count


def _times(place: Path, event: str) -> list[float]:
    """Return when the log says that engine 0 ``joined``, ``left`` or ``is up``."""
    text = (place / "run.log").read_text() if (place / "run.log").exists() else ""
    found = re.findall(rf"^(\S+ \S+) INFO \S+ engine 0 {event}", text, re.MULTILINE)
    return [datetime.strptime(t, "%Y-%m-%d %H:%M:%S,%f").timestamp() for t in found]


def _server(place: Path) -> int:
    """Return the process group of engine 0's server."""
    model = str(place / "engines" / "engine_0" / "model").encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            pid = int(folder.name)
            if b"launch_server" in command and model in command and os.getpgid(pid) == pid:
                return pid
        except OSError:
            continue
    raise RuntimeError("engine 0 has no server")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat and one kill")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    parser.add_argument("--sglang-python", type=Path, default=Path(".sglang/bin/python"))
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        stopped = asyncio.run(
            stopped_mid_transfer(
                args.sglang_python, Path(name) / "stopped", repeats=1 if args.quick else 5
            )
        )
        killed = killed_in_a_run(args.sglang_python, Path(name), kills=1 if args.quick else 3)
    for title, figures in (("stopped in mid transfer", stopped), ("killed in a run", killed)):
        print(title)
        for key, value in figures.items():
            print(f"  {key:<26}{value:>10.3f}")
    misses = [
        f"{key} {figures[key]:.3f} is above {limit}"
        for figures, key, limit in (
            (stopped, "other_delay_s", OTHER_ENGINE_LIMIT_S),
            (killed, "trajectories_lost", 0),
            (killed, "out_of_pool_s", LOST_LIMIT_S),
            (killed, "back_after_healthy_s", BACK_LIMIT_S),
        )
        if figures[key] > limit
    ]
    finish("engine_faults", {"stopped": stopped, "killed": killed}, misses, started, args.output)


if __name__ == "__main__":
    main()
