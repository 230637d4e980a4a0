from __future__ import annotations

import asyncio

import pytest

from tests.coordination.coordinator_runs import (
    BATCH,
    HELDOUT,
    NAMES,
    failure,
    forever,
    go,
    make_run,
    raising,
    until_over,
)
from tests.fakes import two_member_group


def test_evaluates_every_so_many_steps_and_the_last_version():
    async def reward(version):
        return version / 10

    run = go(
        make_run(
            bound=0,
            steps=7,
            workers=[{"evaluate": reward, "polls_before_live": 2}, {"polls_before_live": 4}],
            evaluation_every_steps=3,
            evaluation_tasks=HELDOUT,
        )
    )

    versions = [version for _, _, version in run.happened("evaluate")]
    # A due evaluation plays what the engine has: the version before, if the new one is on its way.
    assert versions == [2, 5, 7]
    assert run.place("trained", 3) < run.place("evaluate", NAMES[0], 2) < run.place("trained", 4)
    assert run.place("live", NAMES[1], 7) < run.place("evaluate", NAMES[0], 7)
    assert run.metrics.summary()["eval_reward_final"] == 0.7
    assert run.metrics.summary()["eval_policy_version"] == 7
    assert run.lines[3]["eval/reward_mean"] == 0.2, "written with the step after it"


def test_without_a_period_only_the_last_version_is_evaluated():
    async def reward(version):
        return 0.5

    run = go(make_run(steps=4, workers=[{"evaluate": reward}], evaluation_tasks=HELDOUT))

    assert run.happened("evaluate") == [("evaluate", NAMES[0], 4)]


def test_training_goes_on_during_an_evaluation():
    """The first evaluation ends after the last step; those that are due meanwhile are left out."""

    async def body():
        third_step = asyncio.Event()
        evaluating: list[int] = []

        async def during(step):
            if step == 3:
                third_step.set()

        async def reward(version):
            evaluating.append(version)
            assert len(evaluating) == 1, "one evaluation at a time"
            await third_step.wait()
            for _ in range(100):  # until the training would be over
                await asyncio.sleep(0)
            evaluating.remove(version)
            return 0.5

        run = make_run(
            steps=3,
            workers=[{"evaluate": reward}],
            learner={"during": during},
            evaluation_every_steps=1,
            evaluation_tasks=HELDOUT,
        )
        await until_over(run)
        return run

    run = asyncio.run(body())

    (_, _, first), (_, _, last) = run.happened("evaluate")
    assert run.place("evaluate", NAMES[0], first) < run.place("step", 2)
    assert (run.learner.steps, last) == (3, 3)


def test_reaching_the_reward_of_an_evaluation_ends_the_run():
    async def reward(version):
        return version / 10

    run = go(
        make_run(
            bound=0,
            steps=50,
            workers=[{"evaluate": reward}],
            evaluation_every_steps=2,
            evaluation_tasks=HELDOUT,
            stop_at_eval_reward=0.3,
        )
    )

    assert 4 <= run.learner.steps <= 6
    assert run.metrics.summary()["eval_reward_final"] >= 0.3
    reached = [version for _, _, version in run.happened("evaluate")]
    assert all(version < 3 for version in reached[:-1]), (
        "the evaluation that reached it is the last"
    )


def test_reaching_the_reward_ends_the_wait_for_a_batch():
    """The evaluation ends when nothing else can happen: no group in flight ever finishes."""

    async def body():
        async def reward(version):
            while run.ledger.counts().in_flight < 3 * BATCH or not run.workers[0].polling:
                await asyncio.sleep(0)
            for _ in range(10):  # the train loop looks at the last report, and waits again
                await asyncio.sleep(0)
            return 1.0

        def finish(assignment, version):
            return two_member_group(assignment, version) if assignment.group_id < BATCH else None

        run = make_run(
            bound=2,
            steps=50,
            workers=[{"evaluate": reward, "finish": finish}],
            evaluation_every_steps=1,
            evaluation_tasks=HELDOUT,
            stop_at_eval_reward=1.0,
        )
        await until_over(run)
        return run

    run = asyncio.run(body())

    assert run.learner.steps == 1 and len(run.happened("evaluate")) == 1


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        (raising(RuntimeError("no memory")), f"{NAMES[0]}: no memory"),
        (forever, f"{NAMES[0]}: waited 0.02 s for an evaluation"),
    ],
)
def test_failed_evaluation_ends_the_run_under_the_name_of_its_worker(every, evaluate, expected):
    run = make_run(
        steps=4,
        workers=[{"evaluate": evaluate}],
        evaluation_every_steps=every,
        evaluation_tasks=HELDOUT,
        evaluation_timeout_s=0.02,
    )

    assert failure(run) == expected


def test_evaluation_that_fails_beside_the_training_is_not_forgotten():
    evaluations = []

    async def fail_once(version):
        evaluations.append(version)
        if len(evaluations) == 1:
            raise RuntimeError("no memory")
        return 0.5

    run = make_run(
        steps=20,
        workers=[{"evaluate": fail_once}],
        evaluation_every_steps=2,
        evaluation_tasks=HELDOUT,
    )

    assert failure(run) == f"{NAMES[0]}: no memory"
    assert len(evaluations) == 1 and run.learner.steps < 20


def test_last_weights_that_never_become_live_end_the_run():
    run = make_run(
        bound=5,
        steps=2,
        workers=[{"evaluate": raising(AssertionError)}, {"polls_before_live": 10**9}],
        evaluation_tasks=HELDOUT,
        answer_timeout_s=0.02,
    )

    assert failure(run) == "training: waited 0.02 s for the last weights to become live"
