import os
import socket

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
