import contextlib
from collections import Counter

import numpy as np
import pytest

from skyrl_async.simulate.learner import SimulatedLearner, Weights, count_staleness
from skyrl_async.simulate.step_times import StepTimes
from skyrl_async.types import SampledBatch, SampledGroup, TrajectoryGroup
from tests.records import make_trajectory, make_turn


class Ledger:
    def part(self, name):
        return contextlib.nullcontext()


def batch(*, train_version, cut_off, versions):
    """Return a batch of one group, with one trajectory for each list of versions."""
    members = tuple(
        make_trajectory(
            make_turn([1, 2], [3] * len(v), version=v), make_turn([4], [5], version=v[-1])
        )
        for v in versions
    )
    group = TrajectoryGroup(group_id=0, task_id="t", trajectories=members)
    return SampledBatch(
        lease_id=0,
        train_version=train_version,
        groups=(SampledGroup(group=group, min_trainable_version=cut_off),),
    )


def learner(times, slept):
    return SimulatedLearner(Weights(size_bytes=64), times, ledger=Ledger(), sleep=slept.append)


def test_a_step_takes_the_given_time_and_makes_a_version():
    slept: list[float] = []
    simulated = learner(StepTimes(step_s=2.0, step_s_per_token=0.5), slept)
    # Two trajectories of 2 + 3 + 1 + 1 tokens.
    result = simulated.step(batch(train_version=0, cut_off=0, versions=[[0, 0, 0], [0, 0, 0]]))
    assert slept == [pytest.approx(2.0 + 0.5 * 14, abs=0.05)]
    assert (result.policy_version, result.skipped, simulated.policy_version) == (1, False, 1)
    assert result.metrics["learner/batch_tokens"] == 14
    assert result.staleness_counts == {0: 8}


def test_a_batch_for_another_version_is_refused():
    with pytest.raises(RuntimeError, match="sampled for policy version 3, the learner is at 0"):
        learner(StepTimes(), []).step(batch(train_version=3, cut_off=0, versions=[[0]]))


def test_staleness_is_counted_over_the_tokens_that_are_young_enough():
    counted = batch(train_version=9, cut_off=6, versions=[[5, 6, 8], [7, 7, 7], [4, 4, 5]])
    ages = [9 - v for t in [[5, 6, 8, 8], [7, 7, 7, 7], [4, 4, 5, 5]] for v in t if v >= 6]
    assert count_staleness(counted) == Counter(ages)


def test_weights_have_the_given_size_and_a_checkpoint_keeps_the_version():
    simulated = SimulatedLearner(Weights(size_bytes=4096), StepTimes(), ledger=Ledger())
    assert sum(p.numel() * p.element_size() for p in simulated.model.parameters()) == 4096
    assert simulated.roll_back() == 1
    state = simulated.training_state()
    other = learner(StepTimes(), [])
    other.restore_counters(state.counters)
    assert other.policy_version == 1


def test_negative_times_are_refused():
    with pytest.raises(ValueError, match=">= 0"):
        StepTimes(step_s=-1.0)
    with pytest.raises(ValueError, match=">= 0"):
        StepTimes(step_s_per_token=float(np.nan))
