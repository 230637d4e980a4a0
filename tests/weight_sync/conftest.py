import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from skyrl_async.weight_sync.pair import host_store


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 2
    for thread in set(threading.enumerate()) - before:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), f"{thread.name} is still running"


@pytest.fixture(scope="module")
def store() -> dist.TCPStore:
    return host_store()
