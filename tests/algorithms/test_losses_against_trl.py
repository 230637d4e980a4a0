"""The losses against TRL's own loss code, on the same tensors.

TRL's trainers compute their loss in one method; here it runs on a stand-in for the trainer whose
model returns the logprobs of the test.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from skyrl_async.algorithms.policy_losses import cispo, dual_clip, ppo_clip, sapo
from skyrl_async.algorithms.sequence_losses import gmpo, gspo, vespo
from skyrl_async.algorithms.tokens import LossTokens

pytest.importorskip("trl", reason="trl is not installed")

pytestmark = pytest.mark.peers

LENGTHS = (7, 1, 4, 6)
SEQUENCE_MEAN, TOKEN_MEAN = "sequence mean", "token mean"


class Batch:
    """Padded tensors, as TRL takes them, and the same tokens without padding."""

    def __init__(self, *, seed: int, spread: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(LENGTHS), max(LENGTHS))
        steps = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        self.mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
        self.old = -0.1 - 4 * torch.rand(shape, generator=generator, dtype=torch.float64)
        self.current = (self.old + steps).requires_grad_()
        self.advantages = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
        assert (self.advantages > 0).any()
        assert (self.advantages < 0).any()

    def tokens(self) -> LossTokens:
        """The old policy of TRL stands for both the proximal and the behavior policy."""
        rows = torch.arange(len(LENGTHS))[:, None].expand_as(self.mask)
        return LossTokens(
            current_logprobs=self.current[self.mask],
            proximal_logprobs=self.old[self.mask],
            behavior_logprobs=self.old[self.mask],
            advantages=self.advantages[:, None].expand_as(self.mask)[self.mask],
            sequence_ids=rows[self.mask],
            num_sequences=len(LENGTHS),
        )


def trl_loss(batch: Batch, trainer_path: str, **settings: Any) -> Tensor:
    module, name = trainer_path.rsplit(".", 1)
    trainer_class = getattr(importlib.import_module(module), name)
    zeros = torch.zeros_like(batch.old)
    arguments = {
        "delta": None,
        "steps_per_generation": 1,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.current, zeros, None),
        get_gamma_weights=getattr(trainer_class, "get_gamma_weights", None),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        beta=0.0,
        importance_sampling_level="token",
        args=SimpleNamespace(**{key: settings.pop(key, value) for key, value in arguments.items()}),
    )
    vars(trainer).update(settings)
    prompt = torch.zeros((len(LENGTHS), 1), dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": torch.zeros_like(batch.mask, dtype=torch.int64),
        "completion_mask": batch.mask.to(torch.int64),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "num_items_in_batch": batch.mask.sum(),
    }
    return trainer_class._compute_loss(trainer, None, inputs)


GRPO = "trl.trainer.grpo_trainer.GRPOTrainer"
GMPO = "trl.experimental.gmpo.gmpo_trainer.GMPOTrainer"
PPO_RANGE = {"epsilon_low": 0.2, "epsilon_high": 0.28}

CASES = [
    ("ppo", ppo_clip, GRPO, {"loss_type": "grpo", **PPO_RANGE}, SEQUENCE_MEAN),
    ("dapo", ppo_clip, GRPO, {"loss_type": "dapo", **PPO_RANGE}, TOKEN_MEAN),
    ("dual clip", dual_clip, GRPO, {"loss_type": "dapo", "delta": 3.0, **PPO_RANGE}, TOKEN_MEAN),
    (
        "gspo",
        gspo,
        GRPO,
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
        SEQUENCE_MEAN,
    ),
    ("cispo", cispo, GRPO, {"loss_type": "cispo", "epsilon_high": 5.0}, TOKEN_MEAN),
    ("sapo", sapo, GRPO, {"loss_type": "sapo"}, SEQUENCE_MEAN),
    ("vespo", vespo, GRPO, {"loss_type": "vespo"}, TOKEN_MEAN),
    ("gmpo", gmpo, GMPO, {"epsilon_low": 0.4, "epsilon_high": 0.4}, SEQUENCE_MEAN),
]


@pytest.mark.parametrize("spread", [1e-4, 0.1, 1.5])
@pytest.mark.parametrize(
    ("loss", "trainer", "settings", "aggregate"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_loss_and_gradient_equal_those_of_trl(loss, trainer, settings, aggregate, spread):
    for seed in range(5):
        batch = Batch(seed=seed, spread=spread)
        tokens = batch.tokens()
        per_token = loss(tokens).loss
        ours = tokens.means(per_token).mean() if aggregate == SEQUENCE_MEAN else per_token.mean()
        theirs = trl_loss(batch, trainer, **settings)
        (our_gradient,) = torch.autograd.grad(ours, batch.current)
        (their_gradient,) = torch.autograd.grad(theirs, batch.current)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-6, atol=1e-6)
