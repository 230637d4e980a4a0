"""Whole runs on real Ray: workers that die, interrupts, several ranks, several nodes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from skyrl_async.timeline.arrows import arrows
from skyrl_async.timeline.reader import read_trace
from tests.runtime.launch import (
    finish,
    metrics_of,
    output_of,
    processes_mentioning,
    start,
    wait_until,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

RAY = ("runtime=ray", "logging.tensorboard=false")


def ray_processes(folder: Path) -> list[int]:
    """Return the living processes that inherited the run's marker."""
    return processes_mentioning(f"SKYRL_TEST_RUN={folder}")


def pid_of_actor(folder: Path, class_name: str) -> int:
    found = []
    for pid in ray_processes(folder):
        try:
            if f"ray::{class_name}" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        except OSError:
            continue
    assert len(found) == 1, (class_name, found)
    return found[0]


def start_marked(folder: Path, *overrides: str):
    return start(folder, *RAY, *overrides, SKYRL_TEST_RUN=str(folder))


def test_two_actors_and_two_ranks_train_and_leave_no_process(tmp_path: Path):
    folder = tmp_path / "run"
    process = start_marked(folder, "run.steps=6", "rollout.num_actors=2", "learner.num_ranks=2")
    summary = finish(process, folder, timeout_s=150)
    assert (summary["status"], summary["exit_code"]) == ("finished", 0), output_of(folder)
    assert summary["steps"] == 6 and summary["trajectories_trained"] == 96
    assert summary["staleness_observed_max"] <= summary["staleness_configured_max"]
    assert set(summary["workers"]) == {
        *("learner 0", "learner 1", "rollout actor 0", "rollout actor 1")
    }
    trace = read_trace(folder)
    assert {lane.process for lane in trace.lanes} == {"coordinator", *summary["workers"]}
    ways = {(a.policy_version, a.engine) for a in arrows(trace) if len(a.stops) == 3}
    # Publishing is newest-wins, and the last version may come after the last look at it.
    assert {engine for _, engine in ways} == {"rollout actor 0", "rollout actor 1"}
    wait_until(lambda: not ray_processes(folder), timeout_s=10, what="all processes ended")


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("RayRolloutActor", "rollout actor 0"),
        ("RayLearnerRank", "learner 0"),
    ],
)
@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_its_name(tmp_path: Path, class_name: str, name: str):
    folder = tmp_path / "run"
    process = start_marked(folder, "run.steps=100000")
    wait_until(lambda: len(metrics_of(folder)) >= 2, timeout_s=120, what="it trains")
    killed_s = time.monotonic()
    os.kill(pid_of_actor(folder, class_name), signal.SIGKILL)
    summary = finish(process, folder, timeout_s=15)
    assert time.monotonic() - killed_s < 10
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)
    assert summary["error"].startswith(name), summary["error"]
    assert name in output_of(folder)
    wait_until(lambda: not ray_processes(folder), timeout_s=10, what="all processes ended")


@pytest.mark.slow
def test_ctrl_c_stops_within_five_seconds_and_leaves_no_process(tmp_path: Path):
    folder = tmp_path / "run"
    process = start_marked(folder, "run.steps=100000")
    wait_until(lambda: len(metrics_of(folder)) >= 2, timeout_s=120, what="it trains")
    stopped_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    summary = finish(process, folder, timeout_s=15)
    assert time.monotonic() - stopped_s < 5
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 130)
    wait_until(lambda: not ray_processes(folder), timeout_s=5, what="all processes ended")


@pytest.mark.slow
def test_actors_are_placed_on_both_nodes_of_a_cluster(tmp_path: Path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2)
        folder = tmp_path / "run"
        process = start_marked(
            folder,
            "run.steps=4",
            "rollout.num_actors=2",
            f"cluster.address={cluster.address}",
        )
        summary = finish(process, folder, timeout_s=150)
        assert (summary["status"], summary["steps"]) == ("finished", 4), output_of(folder)
        nodes = {place["node"] for name, place in summary["workers"].items() if "actor" in name}
        assert len(nodes) == 2, summary["workers"]
    finally:
        cluster.shutdown()
