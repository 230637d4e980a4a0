"""Advantage estimators: pure functions from rewards to one value per trajectory.

Shapes: ``G`` trajectories of one group (all of one task), ``N`` trajectories of a batch of groups.

Everything is float64, and for finite rewards every result is finite: where an estimator is not
defined (named at each function) its value is 0, equal rewards give exactly 0 after centering, and
what would overflow stays at the largest float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

GroupEstimator = Callable[[NDArray[np.floating]], NDArray[np.float64]]
BatchEstimator = Callable[[NDArray[np.floating], NDArray[np.generic]], NDArray[np.float64]]

_STD_EPS = 1e-6
_LARGEST = float(np.finfo(np.float64).max)


def mean_centered(rewards: NDArray[np.floating]) -> NDArray[np.float64]:
    r"""Return the rewards minus their mean.

    .. math::

        A_i = R_i - \operatorname{mean}(R)

    A singleton gets 0.

    Args:
        rewards: ``[G]``, of all finished trajectories of one task.

    Source: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), without its constant length.
    """
    values, exponent = _scaled(rewards)
    return _unscaled(_centered(values), exponent)


def grpo(rewards: NDArray[np.floating]) -> NDArray[np.float64]:
    r"""Return the rewards minus their mean, over their standard deviation.

    .. math::

        A_i = \frac{R_i - \operatorname{mean}(R)}{\operatorname{std}(R) + 10^{-6}}

    The standard deviation is that of the group (divided by ``G``). Equal rewards give zeros, and
    so does a singleton.

    Args:
        rewards: ``[G]``, of all finished trajectories of one task.

    Source: DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), equation 21 and below.
    """
    values, exponent = _scaled(rewards)
    return _over_std(_centered(values), exponent)


def rloo(rewards: NDArray[np.floating]) -> NDArray[np.float64]:
    r"""Return each reward minus the mean of the others.

    .. math::

        A_i = R_i - \frac{1}{G - 1} \sum_{j \neq i} R_j
            = \frac{G}{G - 1} \big(R_i - \operatorname{mean}(R)\big)

    A singleton has no others to compare with, so that its advantage is not defined: it gets 0.

    Args:
        rewards: ``[G]``, of all finished trajectories of one task.

    Source: RLOO (Ahmadian et al. 2024, arXiv 2402.14740), leave-one-out baseline.
    """
    values, exponent = _scaled(rewards)
    return _unscaled(_centered(values) * (values.size / max(values.size - 1, 1)), exponent)


def max_rl(rewards: NDArray[np.floating]) -> NDArray[np.float64]:
    r"""Return the rewards minus their mean, over their mean.

    .. math::

        A_i = \frac{R_i - \operatorname{mean}(R)}{\operatorname{mean}(R)}

    Meant for rewards that are not negative, above all 0 and 1, where the mean is the pass rate. A
    group with a mean of 0 has nothing to learn from and gets zeros; one with a negative mean, for
    which the quotient would prefer the worse trajectories, gets zeros as well.

    Args:
        rewards: ``[G]``, of all finished trajectories of one task.

    Source: MaxRL (Tajwar et al. 2026, arXiv 2602.02710), the estimator with the mean as baseline.
    """
    values, _ = _scaled(rewards)
    mean = values.mean() if values.size else 0.0
    if mean <= 0:
        return np.zeros_like(values)
    with np.errstate(over="ignore"):
        return np.clip(_centered(values) / mean, -_LARGEST, _LARGEST)


def optimal_off_policy_baseline(
    rewards: NDArray[np.floating],
    weights: NDArray[np.floating],
    squared_gradient_norms: NDArray[np.floating],
) -> NDArray[np.float64]:
    r"""Return the rewards minus the baseline of least variance under importance weights.

    .. math::

        A_i = R_i - b^*, \qquad
        b^* = \frac{\sum_j w_j^2 \lVert\nabla_\theta\log\pi_\theta(\tau_j)\rVert^2 R_j}
                   {\sum_j w_j^2 \lVert\nabla_\theta\log\pi_\theta(\tau_j)\rVert^2}

    Only the relative sizes of the weights and of the norms matter. If every product of the two is
    0, the baseline is not defined and the advantages are zeros; those of a singleton are, too.

    Args:
        rewards: ``[G]``, of the trajectories that share the baseline.
        weights: ``[G]``, importance weight of each whole trajectory; not negative.
        squared_gradient_norms: ``[G]``, squared norm of the gradient of the trajectory's logprob;
            not negative.

    Raises:
        ValueError: if the shapes differ, or a weight or norm is negative or not finite.

    Source: VCPO (arXiv 2602.17616), off-policy optimal baseline.
    """
    values, exponent = _scaled(rewards)
    factors = [np.asarray(f, dtype=np.float64) for f in (weights, squared_gradient_norms)]
    for factor in factors:
        if factor.shape != values.shape:
            raise ValueError(
                f"shapes differ: rewards {values.shape}, weights or norms {factor.shape}"
            )
        if not np.all(np.isfinite(factor) & (factor >= 0)):
            raise ValueError("weights and squared gradient norms must be finite and not negative")
    # Logarithms, because squares of large weights overflow and those of small ones vanish.
    with np.errstate(divide="ignore"):
        logs = 2 * np.log(factors[0]) + np.log(factors[1])
    if not np.any(_centered(values)) or np.all(np.isneginf(logs)):
        return np.zeros_like(values)
    shares = np.exp(logs - logs.max())
    return _unscaled(values - np.average(values, weights=shares), exponent)


def batch_normalized(
    rewards: NDArray[np.floating], group_ids: NDArray[np.generic]
) -> NDArray[np.float64]:
    r"""Return the rewards minus their group's mean, over the standard deviation of the batch.

    .. math::

        \hat A_i = R_i - \operatorname{mean}(R_{g(i)}), \qquad
        A_i = \frac{\hat A_i}{\operatorname{std}(\hat A_1, \ldots, \hat A_N) + 10^{-6}}

    Singletons and groups of equal rewards get 0. They count in the standard deviation; a batch
    without them, as in the paper, is the caller's to choose.

    Args:
        rewards: ``[N]``, of all trajectories of the batch.
        group_ids: ``[N]``, the group of each trajectory; any labels, in any order.

    Raises:
        ValueError: if the shapes differ.

    Source: ScaleRL (Khatri et al. 2025, arXiv 2510.13786), batch-level normalization.
    """
    values, exponent = _scaled(rewards)
    return _over_std(_group_centered(values, group_ids), exponent)


def reinforce_plus_plus(
    rewards: NDArray[np.floating], group_ids: NDArray[np.generic]
) -> NDArray[np.float64]:
    r"""Return the rewards minus the mean of the batch, over its standard deviation.

    .. math::

        A_i = \frac{R_i - \operatorname{mean}(R_1, \ldots, R_N)}
                   {\operatorname{std}(R_1, \ldots, R_N) + 10^{-6}}

    Groups have no part in it, so that singletons and groups of equal rewards have advantages. A
    batch of equal rewards gets zeros. This is the form without a token-level KL penalty; with one,
    :func:`skyrl_async.algorithms.returns.reinforce_plus_plus_returns` come first, and the whitening
    is over tokens.

    Args:
        rewards: ``[N]``, of all trajectories of the batch.
        group_ids: ``[N]``, checked for its shape only.

    Raises:
        ValueError: if the shapes differ.

    Source: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262), global advantage normalization.
    """
    values, exponent = _scaled(rewards)
    _check_shapes(values, group_ids)
    return _over_std(_centered(values), exponent)


def reinforce_plus_plus_baseline(
    rewards: NDArray[np.floating], group_ids: NDArray[np.generic]
) -> NDArray[np.float64]:
    r"""Return the rewards minus their group's mean, whitened over the batch.

    .. math::

        \hat A_i = R_i - \operatorname{mean}(R_{g(i)}), \qquad
        A_i = \frac{\hat A_i - \operatorname{mean}(\hat A_1, \ldots, \hat A_N)}
                   {\operatorname{std}(\hat A_1, \ldots, \hat A_N) + 10^{-6}}

    With one value per trajectory the mean of :math:`\hat A` is 0, so that this is
    :func:`batch_normalized` but for rounding. Singletons and groups of equal rewards get 0.

    Args:
        rewards: ``[N]``, of all trajectories of the batch.
        group_ids: ``[N]``, the group of each trajectory; any labels, in any order.

    Raises:
        ValueError: if the shapes differ.

    Source: REINFORCE++ with baseline (Hu et al. 2025, arXiv 2501.03262).
    """
    values, exponent = _scaled(rewards)
    return _over_std(_centered(_group_centered(values, group_ids)), exponent)


def global_baseline(
    rewards: NDArray[np.floating], group_ids: NDArray[np.generic]
) -> NDArray[np.float64]:
    r"""Return the rewards minus the mean of the batch, for tasks with one trajectory each.

    .. math::

        A_i = R_i - \operatorname{mean}(R_1, \ldots, R_N)

    Groups have no part in it. A batch of one trajectory gets 0.

    Args:
        rewards: ``[N]``, of all trajectories of the batch.
        group_ids: ``[N]``, checked for its shape only.

    Raises:
        ValueError: if the shapes differ.

    Source: REINFORCE with a constant baseline (Williams 1992).
    """
    values, exponent = _scaled(rewards)
    _check_shapes(values, group_ids)
    return _unscaled(_centered(values), exponent)


GROUP_ESTIMATORS: Mapping[str, GroupEstimator] = MappingProxyType(
    {"grpo": grpo, "max_rl": max_rl, "mean_centered": mean_centered, "rloo": rloo}
)
BATCH_ESTIMATORS: Mapping[str, BatchEstimator] = MappingProxyType(
    {
        "batch_normalized": batch_normalized,
        "global_baseline": global_baseline,
        "reinforce_plus_plus": reinforce_plus_plus,
        "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    }
)


def estimate(name: str, rewards: ArrayLike, group_ids: ArrayLike) -> NDArray[np.float64]:
    r"""Return the advantages of a batch by the estimator of that name.

    .. math::

        A_{\{i : g(i) = g\}} = f(R_{\{i : g(i) = g\}}) \text{ for every group } g,
        \qquad\text{or}\qquad A = f(R, g)

    The first for the names of :data:`GROUP_ESTIMATORS`, the second for :data:`BATCH_ESTIMATORS`.

    Args:
        name: a key of one of the two.
        rewards: ``[N]``, of all trajectories of the batch.
        group_ids: ``[N]``, the group of each trajectory; any labels, in any order.

    Raises:
        ValueError: if there is no such estimator, the shapes differ, or a reward is not finite.

    Source: the estimators' own.
    """
    values, ids = np.asarray(rewards, dtype=np.float64), np.asarray(group_ids)
    _check_shapes(values, ids)
    if not np.all(np.isfinite(values)):
        raise ValueError("rewards must be finite")
    if name in BATCH_ESTIMATORS:
        return BATCH_ESTIMATORS[name](values, ids)
    if name not in GROUP_ESTIMATORS:
        known = sorted([*GROUP_ESTIMATORS, *BATCH_ESTIMATORS])
        raise ValueError(f"no advantage estimator {name!r}; there are {', '.join(known)}")
    advantages = np.zeros_like(values)
    for members in _members(ids):
        advantages[members] = GROUP_ESTIMATORS[name](values[members])
    return advantages


def _scaled(rewards: ArrayLike) -> tuple[NDArray[np.float64], int]:
    """Return rewards of at most 1 in size, and the power of two to multiply them with.

    A sum of rewards then cannot overflow. Powers of two change no digit, and rewards of at most 1
    are left alone.
    """
    values = np.asarray(rewards, dtype=np.float64)
    exponent = max(0, int(np.frexp(np.abs(values).max(initial=0.0))[1]))
    return np.ldexp(values, -exponent), exponent


def _unscaled(values: NDArray[np.float64], exponent: int) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return np.clip(np.ldexp(values, exponent), -_LARGEST, _LARGEST)


def _centered(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # The mean of equal numbers is not always that number; its error over a standard deviation as
    # small as itself would be an advantage.
    if values.size == 0 or values.min() == values.max():
        return np.zeros_like(values)
    return values - values.mean()


def _group_centered(values: NDArray[np.float64], group_ids: ArrayLike) -> NDArray[np.float64]:
    _check_shapes(values, group_ids)
    centered = np.zeros_like(values)
    for members in _members(group_ids):
        centered[members] = _centered(values[members])
    return centered


def _over_std(centered: NDArray[np.float64], exponent: int) -> NDArray[np.float64]:
    if not centered.any():
        return np.zeros_like(centered)
    # By the largest first, because squares of small differences between large rewards vanish.
    largest = float(np.abs(centered).max())
    std = largest * math.sqrt(np.mean((centered / largest) ** 2))
    return centered / (std + math.ldexp(_STD_EPS, -exponent))


def _members(group_ids: ArrayLike) -> list[NDArray[np.intp]]:
    """Return the positions of each group's trajectories."""
    _, groups, sizes = np.unique(group_ids, return_inverse=True, return_counts=True)
    return np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])


def _check_shapes(values: NDArray[np.float64], group_ids: ArrayLike) -> None:
    shape = np.shape(group_ids)
    if values.ndim != 1 or shape != values.shape:
        raise ValueError(f"rewards and group_ids need one shape [N], got {values.shape}, {shape}")
