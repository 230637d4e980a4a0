import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from skyrl_async.algorithms.composition import CorrectionSettings
from skyrl_async.learner.algorithm_settings import AlgorithmSettings, KlSettings
from skyrl_async.learner.critic import CriticSettings
from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.types import SampledBatch, SampledGroup, TrajectoryGroup
from tests.records import make_trajectory, make_turn, random_batch


def small_learner(*, algorithm: AlgorithmSettings | None = None, **settings) -> Learner:
    if algorithm is not None:
        settings["algorithm"] = algorithm
    names = [name for name in settings if name in OptimizerSettings.__dataclass_fields__]
    if names:
        settings["optimizer"] = OptimizerSettings(**{n: settings.pop(n) for n in names})
    return Learner(build_tiny_model(hidden_size=16, num_heads=2), LearnerSettings(**settings))


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def with_logprobs(batch: SampledBatch, value: float) -> SampledBatch:
    """Return the batch with every behavior logprob replaced."""
    groups = []
    for sampled in batch.groups:
        members = []
        for trajectory in sampled.group.trajectories:
            changed = copy.copy(trajectory)
            object.__setattr__(
                changed, "behavior_logprobs", np.full(len(trajectory.token_ids), value, np.float32)
            )
            members.append(changed)
        group = TrajectoryGroup(
            group_id=sampled.group.group_id,
            task_id=sampled.group.task_id,
            trajectories=tuple(members),
        )
        cutoff = sampled.min_trainable_version
        groups.append(SampledGroup(group=group, min_trainable_version=cutoff))
    return SampledBatch(
        lease_id=batch.lease_id, train_version=batch.train_version, groups=tuple(groups)
    )


def test_one_step_makes_one_version_and_all_its_optimizer_steps():
    learner = small_learner(num_minibatches=3, num_epochs=2)
    result = learner.step(random_batch(0, train_version=0))
    assert (result.policy_version, result.skipped) == (1, False)
    assert result.metrics["optimizer_steps"] == 6
    assert learner.policy_version == 1


def test_first_optimizer_step_equals_the_literal_gradient():
    """One minibatch, one optimizer step: minus w * A * grad log pi, averaged over loss tokens."""
    batch = random_batch(1, train_version=0, num_groups=2, group_size=3)
    learner = small_learner(
        algorithm=AlgorithmSettings(
            entropy_coefficient=0.0, correction=CorrectionSettings(weight_cap=1.5)
        ),
        num_minibatches=1,
        max_grad_norm=1e9,
    )
    reference = copy.deepcopy(learner.model).double()
    terms, count = [], 0
    for sampled in batch.groups:
        rewards = np.array([t.reward for t in sampled.group.trajectories])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for trajectory, advantage in zip(sampled.group.trajectories, advantages, strict=True):
            ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))
            logprobs = reference(input_ids=ids[None]).logits[0].log_softmax(-1)
            for t in np.flatnonzero(trajectory.sampled):
                logprob = logprobs[t - 1, ids[t]]
                weight = min(math.exp(logprob.item() - trajectory.behavior_logprobs[t]), 1.5)
                terms.append(-weight * advantage * logprob)
                count += 1
    (torch.stack(terms).sum() / count).backward()
    before = weights_of(learner)
    captured = {}
    step = learner.trainer.optimizer.step

    def capture() -> None:
        captured.update({n: p.grad.clone() for n, p in learner.model.named_parameters()})
        step()

    learner.trainer.optimizer.step = capture
    learner.step(batch)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(captured[name].double(), parameter.grad, rtol=1e-4, atol=1e-7)
    assert not same(before, weights_of(learner))


def test_second_minibatch_is_clipped_against_the_start_of_the_step():
    learner = small_learner(learning_rate=0.05)
    result = learner.step(random_batch(2, train_version=0))
    assert result.metrics["offpolicy/clip_fraction"] > 0
    single = small_learner(learning_rate=0.05, num_minibatches=1)
    result = single.step(random_batch(2, train_version=0))
    assert result.metrics["offpolicy/clip_fraction"] == 0


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_a_nonfinite_gradient_changes_nothing_and_is_reported(num_minibatches):
    learner = small_learner(
        algorithm=AlgorithmSettings(correction=CorrectionSettings(weight_cap=1e38)),
        num_minibatches=num_minibatches,
    )
    learner.step(random_batch(3, train_version=0))
    before, state = weights_of(learner), copy.deepcopy(learner.trainer.optimizer.state_dict())
    result = learner.step(with_logprobs(random_batch(4, train_version=1), -1e30))
    assert result.skipped and result.policy_version == 1
    assert same(before, weights_of(learner))
    after = learner.trainer.optimizer.state_dict()
    for index, moments in state["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, after["state"][index][name])
    assert learner.optimizer_steps == num_minibatches
    assert not learner.step(random_batch(5, train_version=1)).skipped


def test_a_minibatch_that_is_not_finite_is_left_out_of_the_step():
    """Weights, moments and metrics are those of a step on the other minibatch alone."""
    learner = small_learner()
    real, calls, after_first = learner.trainer.apply, [], []

    def fail_second(loss, **options):
        calls.append(1)
        if len(calls) == 2:
            after_first.append(weights_of(learner))
            learner.trainer.parameters[0].grad.fill_(float("nan"))
        return real(loss, **options)

    learner.trainer.apply = fail_second
    result = learner.step(random_batch(6, train_version=0))
    assert not result.skipped and learner.policy_version == 1
    assert result.metrics["learner/skipped_minibatches"] == 1
    assert same(after_first[0], weights_of(learner))
    assert learner.optimizer_steps == 1
    clean = small_learner().step(random_batch(6, train_version=0))
    assert 0 < result.metrics["learner/loss_tokens"] < clean.metrics["learner/loss_tokens"]


def test_masked_tokens_change_nothing_but_the_baseline():
    """A token below the cut-off has no part in the gradient, whatever its logprob says."""
    fresh = make_trajectory(make_turn([1, 2], [3, 4], version=2), reward=1.0)
    old_a = make_trajectory(make_turn([1, 2], [5, 6], version=0, logprob=-1.0), reward=0.0)
    old_b = make_trajectory(make_turn([1, 2], [5, 6], version=0, logprob=-9.0), reward=0.0)
    results = []
    for old in (old_a, old_b):
        group = TrajectoryGroup(group_id=0, task_id="t", trajectories=(fresh, old))
        batch = SampledBatch(
            lease_id=0,
            train_version=2,
            groups=(SampledGroup(group=group, min_trainable_version=1),),
        )
        learner = small_learner(num_minibatches=1)
        learner.policy_version = 2
        result = learner.step(batch)
        assert result.staleness_counts == {0: 2}
        results.append(weights_of(learner))
    assert same(*results)


def test_a_batch_for_another_version_is_refused():
    with pytest.raises(RuntimeError, match="policy version 3, the learner is at 0"):
        small_learner().step(random_batch(0, train_version=3))


def test_warmup_scales_the_learning_rate():
    learner = small_learner(warmup_steps=4, learning_rate=1.0, num_minibatches=1)
    rates = [learner.step(random_batch(v, train_version=v)).metrics["policy/lr"] for v in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


ALGORITHMS = {
    "plain": AlgorithmSettings(),
    "masks": AlgorithmSettings(
        correction=CorrectionSettings(token_mask=(0.9, 1.1), normalize_weights=True),
        aggregation="sequence_mean",
    ),
    "critic": AlgorithmSettings(advantage="vtrace", critic=CriticSettings(kind="model")),
    "gradient norms": AlgorithmSettings(
        advantage="optimal_off_policy_baseline", scale_rate_by_ess=True
    ),
}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _train_rank(
    rank: int,
    num_ranks: int,
    port: int,
    dtype: str,
    folder: str,
    algorithm: str = "plain",
    shard_ranks: int = 1,
    sequence_ranks: int = 1,
) -> None:
    torch.set_num_threads(1)
    ranks = RankGroup(
        rank=rank,
        num_ranks=num_ranks,
        store_address=("127.0.0.1", port),
        shard_ranks=shard_ranks,
        sequence_ranks=sequence_ranks,
    )
    model = build_tiny_model(hidden_size=16, num_heads=2).to(getattr(torch, dtype))
    settings = LearnerSettings(
        algorithm=ALGORITHMS[algorithm], optimizer=OptimizerSettings(max_grad_norm=1e9)
    )
    learner = Learner(model, settings, ranks=ranks)
    gradients = []
    step = learner.trainer.optimizer.step

    def capture() -> None:
        gradients.append([full(p.grad).clone() for p in learner.trainer.parameters])
        step()

    learner.trainer.optimizer.step = capture
    # 3 trajectories over 2 minibatches: with 2 ranks, one rank has no token in one of them.
    batch = random_batch(7, train_version=0, num_groups=1, group_size=3)
    result = learner.step(batch)
    torch.save((gradients[0], result.metrics, dict(result.staleness_counts)), f"{folder}/{rank}.pt")
    ranks.close()


@pytest.mark.parametrize(
    ("num_ranks", "shard_ranks", "sequence_ranks", "algorithm", "dtype", "tolerance"),
    [
        (2, 1, 1, "plain", "float32", 1e-5),
        *((2, 1, 1, name, "float64", 1e-10) for name in ALGORITHMS),
        (2, 2, 1, "plain", "float32", 1e-5),
        (2, 2, 1, "plain", "float64", 1e-10),
        (2, 2, 1, "critic", "float64", 1e-10),
        (4, 4, 1, "masks", "float64", 1e-10),
        (4, 2, 1, "plain", "float64", 1e-10),
        (2, 2, 2, "plain", "float32", 1e-5),
        (2, 1, 2, "masks", "float64", 1e-10),
        (4, 4, 2, "plain", "float64", 1e-10),
    ],
)
def test_ranks_have_the_gradient_of_one(
    tmp_path: Path, free_port, num_ranks, shard_ranks, sequence_ranks, algorithm, dtype, tolerance
):
    _train_rank(0, 1, 0, dtype, str(tmp_path), algorithm)
    alone, metrics_alone, counts_alone = torch.load(tmp_path / "0.pt")
    mp.start_processes(
        _train_rank,
        args=(num_ranks, free_port, dtype, str(tmp_path), algorithm, shard_ranks, sequence_ranks),
        nprocs=num_ranks,
        start_method="fork",
    )
    for rank in range(num_ranks):
        gradients, metrics, counts = torch.load(tmp_path / f"{rank}.pt")
        for mine, expected in zip(gradients, alone, strict=True):
            scale = expected.abs().max().item()
            assert (mine - expected).abs().max().item() <= tolerance * max(scale, 1e-3)
        assert counts == counts_alone
        for name, value in metrics_alone.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_a_rollback_restores_weights_and_moments_under_a_new_version():
    learner = small_learner(num_minibatches=1)
    learner.step(random_batch(0, train_version=0))
    learner.remember()
    good, moments = (
        weights_of(learner),
        copy.deepcopy(learner.trainer.optimizer.state_dict()["state"]),
    )
    learner.step(random_batch(1, train_version=1))
    assert not same(good, weights_of(learner))
    assert learner.roll_back() == 3 == learner.policy_version
    assert same(good, weights_of(learner))
    after = learner.trainer.optimizer.state_dict()["state"]
    for index, values in moments.items():
        assert all(torch.equal(value, after[index][name]) for name, value in values.items())
    # Steps after a rollback must not reach into the copy.
    learner.step(random_batch(2, train_version=3))
    assert learner.roll_back() == 5
    assert same(good, weights_of(learner))


def test_the_rate_follows_the_effective_sample_size():
    algorithm = AlgorithmSettings(scale_rate_by_ess=True)
    learner = small_learner(algorithm=algorithm, num_minibatches=1, learning_rate=1e-3)
    result = learner.step(random_batch(0, train_version=0))
    expected = 1e-3 * math.sqrt(result.metrics["offpolicy/ess_fraction"])
    assert result.metrics["policy/lr"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["policy/lr"] < 1e-3


def test_a_divergence_from_the_reference_is_measured_and_held_back():
    reference = build_tiny_model(hidden_size=16, num_heads=2)
    algorithm = AlgorithmSettings(
        kl=KlSettings(coefficient=100.0, estimator="k2"), entropy_coefficient=0.0
    )
    free, held = (
        small_learner(learning_rate=0.01),
        Learner(
            build_tiny_model(hidden_size=16, num_heads=2),
            LearnerSettings(algorithm=algorithm, optimizer=OptimizerSettings(learning_rate=0.01)),
            reference=reference,
        ),
    )

    def distance(learner):
        pairs = zip(learner.model.parameters(), reference.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    for version in range(6):
        batch = random_batch(version, train_version=version)
        free.step(batch)
        result = held.step(batch)
    assert result.metrics["loss/kl"] > 0
    assert distance(held) < distance(free)
    with pytest.raises(ValueError, match="needs a reference policy"):
        small_learner(algorithm=algorithm)
