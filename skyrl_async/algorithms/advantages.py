"""Advantage estimators: pure functions from a group's rewards to one value per trajectory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STD_EPS = 1e-6


def mean_centered(rewards: NDArray[np.floating]) -> NDArray[np.float64]:
    r"""Return :math:`A_i = R_i - \operatorname{mean}(R)`.

    Args:
        rewards: ``[G]``, of all finished trajectories of one task.

    Source: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), without its constant length.
    """
    values = np.asarray(rewards, dtype=np.float64)
    return values - values.mean()


def grpo(rewards: NDArray[np.floating]) -> NDArray[np.float64]:
    r"""Return :math:`A_i = (R_i - \operatorname{mean}(R)) / (\operatorname{std}(R) + 10^{-6})`.

    The standard deviation is that of the group (divided by ``G``). Equal rewards give zeros.

    Args:
        rewards: ``[G]``, of all finished trajectories of one task.

    Source: DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), equation 21 and below.
    """
    centered = mean_centered(rewards)
    return centered / (np.sqrt(np.mean(centered**2)) + _STD_EPS)
