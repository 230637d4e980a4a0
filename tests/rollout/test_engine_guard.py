from __future__ import annotations

import pytest

from skyrl_async.rollout import engine_guard
from skyrl_async.rollout.engine_guard import ServerLog


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_log_never_has_a_secret_however_it_arrives(tmp_path, size):
    text = b"a secret-1 b\nsecret-1secret-2\n\n c secret-2"
    log = ServerLog(tmp_path / "log", [b"secret-1", b"secret-2"])

    for start in range(0, len(text), size):
        log.write(text[start : start + size])
    log.close()

    assert (tmp_path / "log").read_bytes() == b"a *** b\n******\n\n c ***"
    assert list(log.last_lines) == ["a *** b", "******", " c ***"]


def test_endless_line_is_written_in_parts_without_its_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_guard, "_MAX_PENDING_BYTES", 20)
    log = ServerLog(tmp_path / "log", [b"secret"])
    for part in (b"x" * 30 + b"sec", b"ret" + b"y" * 40):
        log.write(part)
        assert b"sec" not in (tmp_path / "log").read_bytes()
    log.close()
    assert (tmp_path / "log").read_bytes() == b"x" * 30 + b"***" + b"y" * 40


def test_long_log_is_begun_again_and_the_older_part_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_guard, "MAX_LOG_BYTES", 20)
    log = ServerLog(tmp_path / "log", [])
    for number in range(5):
        log.write(b"line %d ...\n" % number)
    log.close()
    kept = [(tmp_path / name).read_text().count("line") for name in ("log", "log.1")]
    assert kept == [1, 1]
    assert len(log.last_lines) == 5
