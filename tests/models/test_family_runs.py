"""Whole runs: learner, publishing and engine agree on every version of a model of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_async.learner.tiny_policy import build_tiny_tokenizer
from tests.models.families import family_model
from tests.runtime.launch import finish, metrics_of, run_here, start

pytest_plugins = ("tests.sglang_server",)

# Without staleness the learner and the engine have the same weights for every trained token, so
# that its importance weight is 1 up to numerical error.
ON_POLICY = (
    *("staleness.max=0", "run.steps=3", "learner.num_minibatches=1"),
    *("optimizer.learning_rate=1e-2", "evaluation.num_tasks=0", "logging.tensorboard=false"),
    "checkpoint.every_steps=0",
)
LORA = ("lora.rank=4", "lora.alpha=8")


def folder_of(family: str, place: Path) -> Path:
    family_model(family).save_pretrained(place)
    build_tiny_tokenizer().save_pretrained(place)
    return place


def check(folder: Path, *, tolerance: float) -> None:
    rows = metrics_of(folder)
    assert [row["policy_version"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["policy/grad_norm"] > 0
        assert abs(row["offpolicy/importance_weight_max"] - 1) < tolerance
        assert abs(row["offpolicy/importance_weight_mean"] - 1) < tolerance


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3_moe", ()),
        ("gemma2", ()),
        ("gemma3", ()),
        ("qwen3_tied", ()),
        ("qwen3_tied", (*LORA, "lora.publish=adapter")),
        ("qwen3_moe", (*LORA, "lora.publish=merged")),
    ],
)
def test_trained_tokens_have_the_logprobs_that_they_were_sampled_with(family, overrides, tmp_path):
    model = folder_of(family, tmp_path / "model")
    summary = run_here(tmp_path / "run", f"model.path={model}", *ON_POLICY, *overrides)
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    check(tmp_path / "run", tolerance=1e-3)


@pytest.mark.sglang
@pytest.mark.timeout(300)
@pytest.mark.parametrize("overrides", [(), LORA])
def test_a_served_mixture_of_experts_is_trained(overrides, sglang_python, tmp_path):
    model = folder_of("qwen3_moe", tmp_path / "model")
    folder = tmp_path / "run"
    process = start(
        folder,
        *("runtime=local", "engine.kind=sglang", f"engine.python={sglang_python}"),
        *(f"model.path={model}", *ON_POLICY, *overrides),
    )
    summary = finish(process, folder, timeout_s=240)
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    check(folder, tolerance=1e-3)
