from __future__ import annotations

import copy
import multiprocessing
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from skyrl_async.checkpoint import LEARNER, name_of, newest_whole, remove_leftovers
from skyrl_async.learner.training_state import (
    COUNTERS,
    StateWriter,
    TrainingState,
    load_policy_weights,
    load_training_state,
)
from tests.learner.training_peers import (
    go_on_as_a_rank,
    make_state,
    train,
    whole_weights,
    write_and_be_killed,
    write_beyond_a_limit,
    write_checkpoint,
)

_AT_ONCE = 10


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def written(state: TrainingState, folder: Path) -> Path:
    writer = StateWriter()
    writer.start(state, folder)
    assert writer.finish() > 0
    return folder


def with_counters(state: TrainingState, **counters: float) -> TrainingState:
    return TrainingState(module=state.module, optimizer=state.optimizer, counters=counters)


def linear_state(*, seed: int = 0, frozen: bool = True) -> TrainingState:
    """A frozen base with a small trained part, as an adapter is."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    module[0].requires_grad_(not frozen)
    trained = [p for p in module.parameters() if p.requires_grad]
    return TrainingState(module=module, optimizer=torch.optim.AdamW(trained, lr=0.1))


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    first = make_state(0)
    train(first, steps=3, seed=1)
    folder = written(with_counters(first, policy_version=3, rate_factor=0.5), tmp_path / "s")
    train(first, steps=2, seed=2)

    second = make_state(1)
    assert load_training_state(second, folder) == {"policy_version": 3, "rate_factor": 0.5}
    assert not equal(whole_weights(first), whole_weights(second))
    train(second, steps=2, seed=2)
    assert equal(whole_weights(first), whole_weights(second))


def test_what_is_written_is_the_state_of_the_start_whatever_is_trained_meanwhile(tmp_path):
    state = make_state(0)
    train(state, steps=1, seed=1)
    at_start = whole_weights(state)
    moments = copy.deepcopy(state.optimizer.state_dict()["state"])
    writer = StateWriter()
    writer.start(state, tmp_path / "s")
    train(state, steps=3, seed=2)
    writer.finish()

    other = make_state(1)
    load_training_state(other, tmp_path / "s")
    assert equal(at_start, whole_weights(other))
    loaded = other.optimizer.state_dict()["state"]
    assert all(equal(moments[number], loaded[number]) for number in moments)


@pytest.mark.parametrize("shard", [True, False])
def test_two_ranks_go_on_from_one_and_one_from_two(tmp_path, free_port, shard):
    """With FSDP2 shards, and with a copy on each rank."""
    state = make_state(0)
    train(state, steps=3, seed=1)
    written(with_counters(state, policy_version=3), tmp_path / "before")
    arguments = (2, free_port, tmp_path, shard)
    mp.start_processes(go_on_as_a_rank, arguments, nprocs=2, start_method="forkserver")
    assert equal(torch.load(tmp_path / "loaded.pt"), whole_weights(state))

    alone = make_state(5)
    assert load_training_state(alone, tmp_path / "after") == {"policy_version": 4}
    train(state, steps=1, seed=7)
    for name, weight in whole_weights(state).items():
        torch.testing.assert_close(whole_weights(alone)[name], weight, rtol=0, atol=1e-6)
    # The random states are those of rank 0.
    expected = torch.Generator().manual_seed(100)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


def test_random_numbers_go_on_and_a_rank_without_a_state_keeps_its_own(tmp_path):
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    folder = written(make_state(0), tmp_path / "s")
    expected = (torch.rand(1).item(), np.random.normal(), random.gauss(0, 1))
    state = make_state(0)
    load_training_state(state, folder)
    assert (torch.rand(1).item(), np.random.normal(), random.gauss(0, 1)) == expected
    torch.manual_seed(9)
    own = torch.rand(1).item()
    torch.manual_seed(9)
    load_training_state(state, folder, rank=1)
    assert torch.rand(1).item() == own


def test_frozen_weights_are_neither_written_nor_touched(tmp_path):
    state = linear_state(seed=0)
    folder = written(state, tmp_path / "s")
    other = linear_state(seed=1)
    base = other.module[0].weight.clone()
    load_training_state(other, folder)
    assert torch.equal(other.module[0].weight, base)
    assert torch.equal(other.module[1].weight, state.module[1].weight)
    with pytest.raises(ValueError, match=r"0.bias is absent there and \[4\] in this"):
        load_training_state(linear_state(frozen=False), folder)


def test_tied_weights_are_written_once(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(500, 16)
            self.head = torch.nn.Linear(16, 500, bias=False)
            self.head.weight = self.embedding.weight

    sizes = []
    for tied in (True, False):
        module = Tied()
        if not tied:
            module.head = torch.nn.Linear(16, 500, bias=False)
        state = TrainingState(
            module=module, optimizer=torch.optim.AdamW(module.embedding.parameters())
        )
        folder = written(state, tmp_path / str(tied))
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
        other = Tied()
        if tied:
            load_policy_weights(other, folder)
            assert torch.equal(other.head.weight, module.head.weight)
    assert sizes[0] + 500 * 16 * 4 <= sizes[1]


def test_critic_and_its_moments_come_back(tmp_path):
    def make(seed: int) -> TrainingState:
        torch.manual_seed(seed)
        policy, critic = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
        return TrainingState(
            module=policy,
            optimizer=torch.optim.AdamW(policy.parameters()),
            critic_module=critic,
            critic_optimizer=torch.optim.AdamW(critic.parameters()),
        )

    def step(state: TrainingState) -> None:
        assert state.critic_module is not None and state.critic_optimizer is not None
        state.critic_module(torch.ones(3)).square().sum().backward()
        state.critic_optimizer.step()
        state.critic_optimizer.zero_grad()

    first = make(0)
    step(first)
    folder = written(first, tmp_path / "s")
    second = make(1)
    load_training_state(second, folder)
    for state in (first, second):
        step(state)
    assert torch.equal(first.critic_module.weight, second.critic_module.weight)
    assert not second.optimizer.state, "the policy had not taken a step"
    with pytest.raises(ValueError, match="critic_module and critic_optimizer"):
        TrainingState(
            module=first.module, optimizer=first.optimizer, critic_module=first.critic_module
        )


def test_hyperparameters_are_those_of_the_run_that_goes_on(tmp_path):
    first = make_state(0, rate=1e-2)
    train(first, steps=1, seed=1)
    folder = written(first, tmp_path / "s")
    second = make_state(0, rate=5e-4)
    second.optimizer.param_groups[0]["base_rate"] = 5e-4
    before = {k: v for k, v in second.optimizer.param_groups[0].items() if k != "params"}
    load_training_state(second, folder)
    after = {k: v for k, v in second.optimizer.param_groups[0].items() if k != "params"}
    assert after == before and after["lr"] == 5e-4


def test_asking_for_a_state_changes_nothing(tmp_path):
    state = make_state(0)
    before = whole_weights(state)
    written(state, tmp_path / "s")
    assert equal(before, whole_weights(state)) and not state.optimizer.state


def test_another_model_is_refused_with_the_first_difference(tmp_path):
    folder = written(make_state(0), tmp_path / "s")
    module = torch.nn.Linear(2, 2)
    state = TrainingState(module=module, optimizer=torch.optim.AdamW(module.parameters()))
    for load in (load_training_state, lambda s, f: load_policy_weights(s.module, f)):
        with pytest.raises(ValueError) as refused:
            load(state, folder)
        assert str(refused.value).startswith(
            f"{folder}: holds another policy: 0.bias is [7] there and absent in this Linear"
        )


def test_one_state_is_written_at_a_time(tmp_path):
    writer = StateWriter()
    with pytest.raises(RuntimeError, match="no state is being written"):
        writer.finish()
    writer.start(make_state(0), tmp_path / "a")
    with pytest.raises(RuntimeError, match="finish it before the next"):
        writer.start(make_state(0), tmp_path / "b")
    writer.finish()
    writer.start(make_state(0), tmp_path / "b")
    writer.finish()
    assert (tmp_path / "b" / COUNTERS).read_text() == "{}"


def test_a_full_disk_is_an_error_of_the_writer(tmp_path):
    context = multiprocessing.get_context("forkserver")
    messages = context.SimpleQueue()
    process = context.Process(target=write_beyond_a_limit, args=(tmp_path / "s", 1000, messages))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert messages.get() == "rank 0 could not write: [Errno 27] File too large"


@pytest.mark.slow
def test_a_kill_at_any_change_of_the_file_system_leaves_a_whole_checkpoint(tmp_path):
    """Right before every file or folder that is made, synced, renamed or removed."""
    expected = {step: write_and_read(tmp_path / "once" / str(step), step) for step in (1, 2)}
    write_checkpoint(tmp_path / "first", 1)
    outcomes: dict[int, tuple[int, int]] = {}
    for start in range(1, 200, _AT_ONCE):
        roots = {place: tmp_path / f"{place}" for place in range(start, start + _AT_ONCE)}
        for place, code in killed(roots, first=tmp_path / "first").items():
            found, passed_over = newest_whole(roots[place])
            assert found is not None and passed_over == (), f"killed before change {place}"
            outcomes[place] = (found[1].step, code)
            assert equal(read(found[0]), expected[found[1].step]), f"killed before change {place}"
            # The run that goes on cleans up.
            remove_leftovers(roots[place])
            assert names(roots[place]) <= {name_of(1), name_of(2)}
        if code == 0:
            break
    last_kill = max(place for place, (_, code) in outcomes.items() if code != 0)
    steps = [outcomes[place][0] for place in range(1, last_kill + 1)]
    assert steps == sorted(steps) and set(steps) == {1, 2}
    assert last_kill > 20, "as many changes as a checkpoint takes at least"
    assert all(outcome == (2, 0) for place, outcome in outcomes.items() if place > last_kill)
    # Where the first one was left, the second can be written after all.
    write_checkpoint(tmp_path / "1", 2)
    assert names(tmp_path / "1") == {name_of(2)}


def killed(roots: dict[int, Path], *, first: Path) -> dict[int, int]:
    """Write the second checkpoint into copies of ``first``, with a kill at each of the places.

    Returns:
        The exit code of each process, 0 for one that ended before its place came.
    """
    processes = {}
    context = multiprocessing.get_context("forkserver")
    for place, root in roots.items():
        shutil.copytree(first, root)
        process = context.Process(target=write_and_be_killed, args=(root, 2, place))
        process.start()
        processes[place] = process
    codes = {}
    for place, process in processes.items():
        process.join(60)
        assert process.exitcode is not None, f"the writer for place {place} hangs"
        codes[place] = process.exitcode
    return codes


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def write_and_read(root: Path, step: int) -> dict[str, torch.Tensor]:
    return read(write_checkpoint(root, step))


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = make_state(50)
    load_training_state(state, checkpoint / LEARNER)
    return whole_weights(state)
