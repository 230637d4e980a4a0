import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.environments.number_guess import NumberGuess
from skyrl_async.environments.tasks import SEEDS_PER_SPLIT, TaskSource, heldout_tasks

seeds = st.integers(0, 2**64)


def taken(source, count):
    return [source.next() for _ in range(count)]


@given(seeds, seeds)
def test_train_and_heldout_never_share_a_seed(train_seed, heldout_seed):
    train = {t.seed for t in taken(TaskSource("game", seed=train_seed), 50)}
    heldout_source = TaskSource("game", seed=heldout_seed, split="heldout")
    heldout = {t.seed for t in taken(heldout_source, 50)}
    assert max(train) < SEEDS_PER_SPLIT <= min(heldout)
    assert max(heldout) < 2**31
    assert len(train) == len(heldout) == 50


@given(seeds, st.integers(0, 20), st.sampled_from(["train", "heldout"]))
def test_a_stream_resumes_where_it_was(seed, index, split):
    source = TaskSource("game", seed=seed, split=split)
    taken(source, index)
    state = json.loads(json.dumps(source.state()))
    expected = taken(source, 5)
    resumed = TaskSource("game", seed=seed, split=split)
    resumed.restore(state)
    assert taken(resumed, 5) == expected
    assert expected[0].task_id == f"game/{split}/{index}"


def test_different_seeds_give_different_streams():
    first_tasks = {TaskSource("game", seed=seed).next().seed for seed in range(100)}
    assert len(first_tasks) == 100


def test_no_task_repeats_for_a_long_time():
    source = TaskSource("game", seed=0)
    assert len({task.seed for task in taken(source, 50_000)}) == 50_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "has seed=2, this run has seed=1"),
        ({"environment": "chess"}, "environment='chess'"),
        ({"split": "heldout"}, "split='heldout'"),
        ({"index": -1}, "index=-1"),
        ({"index": None}, "index=None"),
    ],
)
def test_a_state_of_another_stream_is_refused(change, message):
    source = TaskSource("game", seed=1)
    with pytest.raises(ValueError, match=message):
        source.restore({**source.state(), **change})
    assert source.next().task_id == "game/train/0"


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="train, heldout"):
        TaskSource("game", seed=0, split="test")
    with pytest.raises(ValueError, match="seed"):
        TaskSource("game", seed=-1)
    with pytest.raises(ValueError, match="num_tasks"):
        heldout_tasks("game", -1)


def test_heldout_tasks_are_fixed_and_cover_the_numbers():
    tasks = heldout_tasks("number_guess", 100)
    assert tasks == heldout_tasks("number_guess", 200)[:100]
    assert len({task.task_id for task in tasks}) == 100
    numbers = Counter()
    game = NumberGuess()
    for task in tasks:
        game.reset(seed=task.seed)
        numbers[game._number] += 1
    assert set(numbers) == set(range(1, 11))
    assert max(numbers.values()) <= 20, numbers
