"""V-trace and GAE against rlax, sequence by sequence."""

import numpy as np
import pytest
import torch

rlax = pytest.importorskip("rlax")
jax = pytest.importorskip("jax")

from skyrl_async.algorithms.off_policy_returns import vtrace  # noqa: E402
from skyrl_async.algorithms.returns import gae  # noqa: E402

pytestmark = pytest.mark.peers

LENGTHS = [1, 7, 0, 30, 2, 100]


@pytest.fixture(autouse=True)
def double_precision():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def random_tokens(seed):
    """Return what the functions take as tensors, and its parts by sequence as arrays."""
    generator = np.random.default_rng(seed)
    total = sum(LENGTHS)
    ids = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    arrays = [generator.normal(size=total) for _ in range(3)]
    after = generator.normal(size=len(LENGTHS))
    parts = [
        [*(a[ids == s] for a in arrays), after[s]] for s, length in enumerate(LENGTHS) if length
    ]
    tensors = [torch.from_numpy(x) for x in (*arrays, ids, after)]
    return tensors, parts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae_agrees_with_rlax(seed, gamma, lam):
    (rewards, values, _, ids, after), parts = random_tokens(seed)
    result = gae(rewards, values, ids, gamma=gamma, lam=lam, bootstrap_values=after)
    expected = [
        rlax.truncated_generalized_advantage_estimation(
            r, np.full_like(r, gamma), lam, np.append(v, end)
        )
        for r, v, _, end in parts
    ]
    np.testing.assert_allclose(result.advantages.numpy(), np.concatenate(expected), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_gae_with_lambdas_of_tokens_agrees_with_rlax(seed):
    (rewards, values, _, ids, after), parts = random_tokens(seed)
    lams = np.random.default_rng(seed).random(len(ids))
    result = gae(rewards, values, ids, lam=torch.from_numpy(lams), bootstrap_values=after)
    ends = np.cumsum([len(r) for r, *_ in parts])[:-1]
    expected = [
        rlax.truncated_generalized_advantage_estimation(r, np.ones_like(r), lam, np.append(v, end))
        for (r, v, _, end), lam in zip(parts, np.split(lams, ends), strict=True)
    ]
    np.testing.assert_allclose(result.advantages.numpy(), np.concatenate(expected), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
@pytest.mark.parametrize("rho_cap", [1.0, 2.5])
def test_vtrace_agrees_with_rlax(seed, gamma, lam, rho_cap):
    """rlax has a trace cap of 1, and mixes the look-ahead of its advantages with lambda."""
    (rewards, values, log_importance, ids, after), parts = random_tokens(seed)
    result = vtrace(
        rewards,
        values,
        ids,
        log_importance,
        gamma=gamma,
        lam=lam,
        rho_cap=rho_cap,
        lam_in_advantages=True,
        bootstrap_values=after,
    )
    expected = [
        rlax.vtrace_td_error_and_advantage(
            v,
            np.append(v[1:], end),
            r,
            np.full_like(r, gamma),
            np.exp(log_w),
            lambda_=lam,
            clip_rho_threshold=rho_cap,
            clip_pg_rho_threshold=rho_cap,
        )
        for r, v, log_w, end in parts
    ]
    targets = np.concatenate(
        [e.errors + v for e, (_, v, _, _) in zip(expected, parts, strict=True)]
    )
    advantages = np.concatenate([e.pg_advantage for e in expected])
    np.testing.assert_allclose(result.targets.numpy(), targets, atol=1e-6)
    np.testing.assert_allclose(result.advantages.numpy(), advantages, atol=1e-6)
    assert result.advantages.dtype == torch.float64
    assert advantages.dtype == np.float64
