"""Loss and gradient of imitation against formulas, for every split over ranks and microbatches."""

from __future__ import annotations

import copy
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from skyrl_async.learner.learner import Learner, LearnerSettings
from skyrl_async.learner.optimizer import OptimizerSettings
from skyrl_async.learner.rank_group import RankGroup
from skyrl_async.learner.tiny_policy import build_tiny_model
from skyrl_async.sft.trainer import DemonstrationTrainer
from skyrl_async.types import TrainSequence

OPTIMIZER = OptimizerSettings(learning_rate=1e-2, max_grad_norm=0.5)


def random_sequences(seed: int, count: int) -> list[TrainSequence]:
    """Sequences of several replies, of very different lengths."""
    rng = np.random.default_rng(seed)
    sequences = []
    for number in range(count):
        length = int(rng.integers(4, 40))
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, True
        sequences.append(
            TrainSequence(
                token_ids=rng.integers(0, 64, length).astype(np.int32),
                loss_mask=mask,
                behavior_logprobs=np.zeros(length, np.float32),
                policy_versions=np.where(mask, 0, -1).astype(np.int32),
                temperature=1.0,
                advantages=mask.astype(np.float32),
                reward=0.0,
                group_id=number,
            )
        )
    return sequences


def literal_loss(model, sequences) -> tuple[torch.Tensor, float]:
    """Means of minus log p and of the entropy over all loss tokens, one sequence at a time."""
    terms, entropies = [], []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for t in np.flatnonzero(sequence.loss_mask):
            terms.append(-logprobs[t - 1, ids[t]])
            entropies.append(-(logprobs[t - 1].exp() * logprobs[t - 1]).sum().item())
    return torch.stack(terms).mean(), float(np.mean(entropies))


def small_model():
    return build_tiny_model(hidden_size=16, num_heads=2).double()


def make_trainer(
    ranks: RankGroup | None = None, **settings
) -> tuple[Learner, DemonstrationTrainer]:
    learner = Learner(small_model(), LearnerSettings(optimizer=OPTIMIZER, **settings), ranks=ranks)
    return learner, DemonstrationTrainer(learner)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def literal_training(batches) -> tuple[torch.nn.Module, list[tuple[float, float, float]]]:
    """Train with plain PyTorch; return the model, and loss, entropy and norm of every step."""
    model = small_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    steps = []
    for batch in batches:
        optimizer.zero_grad()
        loss, entropy = literal_loss(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        steps.append((loss.item(), entropy, norm.item()))
    return model, steps


def check_training(trainer: DemonstrationTrainer, learner: Learner) -> None:
    batches = [random_sequences(seed, count) for seed, count in enumerate((7, 1, 5))]
    model, expected = literal_training(batches)
    outcomes = [trainer.step(batch) for batch in batches]
    for outcome, values in zip(outcomes, expected, strict=True):
        found = (outcome.loss, outcome.entropy, outcome.grad_norm)
        assert found == pytest.approx(values, rel=1e-9)
    assert [o.num_tokens for o in outcomes] == [
        sum(int(s.loss_mask.sum()) for s in batch) for batch in batches
    ]
    ours = dict(learner.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(ours[name]), parameter.detach(), rtol=1e-7, atol=1e-9)
    held_out = random_sequences(9, 6)
    with torch.no_grad():
        loss, _ = literal_loss(model, held_out)
    assert trainer.mean_loss(held_out) == pytest.approx(loss.item(), rel=1e-8)
    assert learner.policy_version == learner.optimizer_steps == 3


@pytest.mark.parametrize("tokens_per_microbatch", [1, 100, 8192])
def test_steps_are_those_of_plain_training_for_any_microbatches(tokens_per_microbatch):
    learner, trainer = make_trainer(tokens_per_microbatch=tokens_per_microbatch)
    check_training(trainer, learner)


def train_on_two_ranks(rank: int, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for port, shard_ranks in zip(ports, (2, 1), strict=True):
        ranks = RankGroup(
            rank=rank,
            num_ranks=2,
            store_address=("127.0.0.1", port),
            shard_ranks=shard_ranks,
            timeout_s=60,
        )
        learner, trainer = make_trainer(ranks, tokens_per_microbatch=64)
        check_training(trainer, learner)
        ranks.close()


def test_two_ranks_train_like_one_with_and_without_shards():
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    mp.start_processes(train_on_two_ranks, (ports,), nprocs=2, start_method="forkserver")


def test_a_step_that_is_not_finite_changes_nothing():
    learner, trainer = make_trainer()
    batch = random_sequences(0, 3)
    trainer.step(batch)
    head = learner.model.get_output_embeddings().weight
    with torch.no_grad():
        head[0, 0] = torch.nan
    before = copy.deepcopy(learner.model.state_dict())
    outcome = trainer.step(batch)
    assert outcome.grad_norm is None and np.isnan(outcome.loss)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0))
