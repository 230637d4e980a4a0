import json
import math
import threading

import numpy as np
import pytest

from skyrl_async.metrics.recorder import Recorder
from skyrl_async.metrics.values import Histogram, Max, Mean, Std, Sum


class FakeClock:
    """Seconds that only go on when told."""

    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


class ListSink:
    """Keeps what is written; refuses what a file could not hold."""

    def __init__(self):
        self.lines = []
        self.closed = False

    def write(self, step, *, metrics, histograms):
        assert not self.closed
        json.dumps(metrics, allow_nan=False)
        assert all(type(n) is int for counts in histograms.values() for n in counts)
        self.lines.append((step, dict(metrics), dict(histograms)))

    def close(self):
        self.closed = True


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def sink():
    return ListSink()


@pytest.fixture
def recorder(sink, clock):
    return Recorder([sink], clock=clock)


def test_values_merge_within_an_interval_and_start_anew_after_it(recorder, sink):
    recorder.record("reward/mean", Mean(1.0, weight=3))
    recorder.record("reward/mean", Mean(5.0))
    recorder.record("reward/std", Std.of([0.0, 2.0]))
    recorder.record("offpolicy/importance_weight_max", Max(2.0))
    recorder.record("offpolicy/importance_weight_max", Max(1.5))
    recorder.record("buffer/groups", 4)
    recorder.record("buffer/groups", 7)
    first = recorder.flush(1)
    assert first["reward/mean"] == 2.0
    assert first["reward/std"] == 1.0
    assert first["offpolicy/importance_weight_max"] == 2.0
    assert first["buffer/groups"] == 7
    recorder.record("reward/mean", Mean(9.0))
    second = recorder.flush(2)
    assert second["reward/mean"] == 9.0
    assert "buffer/groups" not in second
    assert "reward/std" not in second
    assert [line[0] for line in sink.lines] == [1, 2]
    assert sink.lines[0][1] == first


def test_counts_become_rates_over_the_interval(recorder, clock):
    recorder.count("throughput/generated_tokens", 300)
    recorder.count("throughput/generated_tokens", 100)
    recorder.count("throughput/trajectories")
    clock.now += 4
    first = recorder.flush(1)
    assert first["throughput/generated_tokens_per_s"] == 100
    assert first["throughput/trajectories_per_s"] == 0.25
    assert first["time_s"] == 4
    recorder.count("throughput/generated_tokens", 10)
    clock.now += 2
    second = recorder.flush(2)
    assert second["throughput/generated_tokens_per_s"] == 5
    assert second["throughput/trajectories_per_s"] == 0
    assert second["time_s"] == 6
    assert recorder.totals() == {
        "throughput/generated_tokens": 410,
        "throughput/trajectories": 1,
    }


def test_a_sum_is_written_as_zero_once_it_is_known(recorder):
    recorder.record("dropped/stale", Sum(2))
    recorder.record("dropped/stale", Sum(1))
    assert recorder.flush(1)["dropped/stale"] == 3
    assert recorder.flush(2)["dropped/stale"] == 0
    assert recorder.totals() == {"dropped/stale": 3}


def test_a_histogram_gives_mean_p95_max_and_counts(recorder, sink):
    recorder.record("staleness", Histogram({2: 1, 0: 90}))
    recorder.record("staleness", Histogram({1: 9}))
    written = recorder.flush(1)
    assert written["staleness/mean"] == pytest.approx(0.11)
    assert (written["staleness/p95"], written["staleness/max"]) == (1, 2)
    (_, _, histograms), *_ = sink.lines
    assert list(histograms["staleness/histogram"].items()) == [(0, 90), (1, 9), (2, 1)]


def test_workers_of_a_role_are_averaged_and_their_fractions_add_up_to_one(recorder):
    recorder.record_parts("engine", {"decode": 3.0, "wait_requests": 1.0})
    recorder.record_parts("engine", {"decode": 1.0, "wait_requests": 3.0})
    recorder.record_parts("learner", {"train": 2.0, "wait_batch": 0.0})
    written = recorder.flush(1)
    assert written["idle/engine/decode_fraction"] == 0.5
    assert written["idle/engine/wait_requests_fraction"] == 0.5
    assert written["idle/learner/train_fraction"] == 1
    assert written["idle/learner/wait_batch_fraction"] == 0
    assert not [name for name in recorder.flush(2) if name.startswith("idle/")]


def test_values_that_are_not_finite_become_null_and_are_counted(recorder, clock):
    recorder.record("loss/policy", math.nan)
    recorder.record("policy/grad_norm", np.float32("inf"))
    recorder.record("reward/mean", Mean(-math.inf))
    recorder.record("policy/lr", 1e-3)
    written = recorder.flush(1)
    assert [name for name, value in written.items() if value is None] == [
        "loss/policy",
        "policy/grad_norm",
        "reward/mean",
    ]
    assert written["nonfinite_values"] == 3
    assert recorder.flush(2)["nonfinite_values"] == 0


def test_an_interval_without_time_has_no_rate(recorder):
    recorder.count("throughput/trajectories", 3)
    assert recorder.flush(1)["throughput/trajectories_per_s"] is None


def test_extra_values_come_first_among_names_without_a_slash(recorder):
    recorder.add({"reward/mean": Mean(1.0), "loss/policy": 0.5})
    written = recorder.flush(3, extra={"policy_version": 3, "live_version": np.int64(2)})
    assert list(written) == [
        "step",
        "time_s",
        "live_version",
        "policy_version",
        "loss/policy",
        "reward/mean",
        "nonfinite_values",
    ]
    assert type(written["live_version"]) is int


@pytest.mark.parametrize("name", ["", "Reward/mean", "reward//mean", "/reward", "a-b", "a b", "a/"])
def test_names_are_words_separated_by_slashes(recorder, name):
    with pytest.raises(ValueError, match="must be words of a-z, 0-9 and _ separated by slashes"):
        recorder.record(name, 1.0)
    with pytest.raises(ValueError, match="separated by slashes"):
        recorder.record_parts("Learner", {"train": 1.0})


def test_a_name_has_one_kind(recorder):
    recorder.record("reward/mean", Mean(1.0))
    recorder.flush(1)
    with pytest.raises(ValueError, match="reward/mean was recorded as Mean before, now as float"):
        recorder.record("reward/mean", 1.0)
    with pytest.raises(ValueError, match="recorded as Mean before, now as Max"):
        recorder.record("reward/mean", Max(1.0))


def test_a_step_is_written_once(recorder, sink):
    recorder.flush(4)
    with pytest.raises(ValueError, match="step 4 comes after step 4"):
        recorder.flush(4)
    assert len(sink.lines) == 1


def test_the_accumulator_of_a_component_stays_its_own(recorder):
    mine = Mean(1.0)
    recorder.record("reward/mean", mine)
    recorder.record("reward/mean", Mean(3.0))
    assert mine.value() == 1.0


def test_nothing_is_lost_when_threads_record_at_once(recorder):
    start = threading.Barrier(4)

    def work():
        start.wait(timeout=10)
        for _ in range(2000):
            recorder.record("dropped/stale", Sum(1))
            recorder.count("throughput/trajectories")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    start_step = 0
    while any(thread.is_alive() for thread in threads):
        start_step += 1
        recorder.flush(start_step)
    for thread in threads:
        thread.join()
    assert recorder.totals() == {"dropped/stale": 8000, "throughput/trajectories": 8000}


def test_close_closes_every_sink(recorder, sink):
    recorder.close()
    assert sink.closed


def test_time_of_a_run_that_goes_on_continues(sink, clock):
    recorder = Recorder([sink], clock=clock, seconds_before=100.0)
    recorder.count("throughput/trajectories", 20)
    clock.now += 10
    recorder.flush(7)
    (_, metrics, _) = sink.lines[0]
    assert metrics["time_s"] == 110
    assert metrics["throughput/trajectories_per_s"] == 2
