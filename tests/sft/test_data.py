from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.config_loading import load_config
from skyrl_async.learner.demonstrations import DemonstrationError
from skyrl_async.sft.data import (
    batch_at,
    fingerprint,
    held_out_indices,
    load_demonstration_set,
    steps_per_epoch,
)
from tests.sft.demonstrations import write_games


@settings(max_examples=60, deadline=None)
@given(
    num_examples=st.integers(1, 60), examples_per_step=st.integers(1, 20), seed=st.integers(0, 9)
)
def test_an_epoch_has_every_example_once_in_batches_of_nearly_one_size(
    num_examples, examples_per_step, seed
):
    steps = steps_per_epoch(num_examples, examples_per_step)
    assert (steps - 1) * examples_per_step < num_examples <= steps * examples_per_step
    for epoch in range(3):
        batches = [
            batch_at(
                epoch * steps + number,
                num_examples=num_examples,
                examples_per_step=examples_per_step,
                seed=seed,
            )
            for number in range(steps)
        ]
        assert sorted(np.concatenate(batches).tolist()) == list(range(num_examples))
        sizes = {len(batch) for batch in batches}
        assert max(sizes) <= examples_per_step and max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(step: int, seed: int) -> list[int]:
        return batch_at(step, num_examples=50, examples_per_step=50, seed=seed).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(step, seed)) for step in range(3) for seed in range(3)}) == 9


@given(num_examples=st.integers(2, 300), fraction=st.floats(0.001, 0.6), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_held_out_share_is_drawn_once(num_examples, fraction, seed):
    expected = max(1, round(fraction * num_examples))
    if expected == num_examples:
        with pytest.raises(ValueError, match="leave none to train on"):
            held_out_indices(num_examples, fraction=fraction, seed=seed)
        return
    drawn = held_out_indices(num_examples, fraction=fraction, seed=seed)
    assert len(drawn) == expected and drawn <= set(range(num_examples))
    assert drawn == held_out_indices(num_examples, fraction=fraction, seed=seed)


def test_nothing_is_held_out_for_a_fraction_of_0_and_the_seed_matters():
    assert held_out_indices(10, fraction=0, seed=0) == frozenset()
    assert len({held_out_indices(100, fraction=0.2, seed=seed) for seed in range(5)}) == 5


def test_a_file_is_read_split_and_identified(tmp_path):
    path = write_games(tmp_path / "games.jsonl", 40)
    config = load_config(None, [f"sft.data={path}", "sft.eval_fraction=0.1"])
    data = load_demonstration_set(config)
    assert (len(data.training), len(data.held_out), data.num_dropped) == (36, 4, 0)
    together = {s.group_id for s in (*data.training, *data.held_out)}
    assert together == set(range(40))
    assert data.sha256 == load_demonstration_set(config).sha256
    other = load_config(None, [f"sft.data={write_games(tmp_path / 'b.jsonl', 39)}"])
    assert data.sha256 != load_demonstration_set(other).sha256
    order = sorted((*data.training, *data.held_out), key=lambda s: s.group_id)
    assert data.sha256 == fingerprint(order)
    assert data.sha256 != fingerprint(order[::-1])
    first, *others = order
    for changed in (
        replace(first, token_ids=first.token_ids + 1),
        replace(first, loss_mask=~first.loss_mask & (np.arange(len(first.loss_mask)) > 0)),
    ):
        assert data.sha256 != fingerprint([changed, *others])


def test_games_longer_than_the_context_are_refused_or_dropped(tmp_path):
    path = write_games(tmp_path / "games.jsonl", 40)
    overrides = [f"sft.data={path}", "engine.context_length=16"]
    with pytest.raises(DemonstrationError, match="at most 16 are allowed"):
        load_demonstration_set(load_config(None, overrides))
    data = load_demonstration_set(load_config(None, [*overrides, "sft.overlong=drop"]))
    assert data.num_dropped == 40 - len(data.training) - len(data.held_out) > 0
    assert max(len(s.token_ids) for s in data.training) <= 16
