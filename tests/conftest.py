import multiprocessing.forkserver
import os
import socket
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

FORKING = {
    "tests.learner.rank_processes",
    "tests.learner.training_peers",
    "tests.runtime.forked_run",
    "tests.weight_sync.other_process",
}
"""Modules that fork processes from the one server that a test process has."""

LOADED = (
    "torch._dynamo",  # by the first step of an optimizer
    "skyrl_async.sweep.preload",
    "tests.learner.training_peers",
    "tests.weight_sync.other_process",
)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the fork server beside the first tests, with what any of its processes would load."""
    if session.config.option.collectonly or FORKING.isdisjoint(sys.modules):
        return
    multiprocessing.forkserver.set_forkserver_preload(list(LOADED))
    multiprocessing.forkserver.ensure_running()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
