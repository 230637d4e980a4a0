"""How far a step may go on the data that there is: pure functions.

Shapes: ``N`` samples: tokens, or trajectories where the weight is one of a whole trajectory.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def ess_rate_scale(weights: Tensor) -> Tensor:
    r"""Return what to multiply the learning rate by: the root of the effective sample fraction.

    .. math::

        \sqrt{\frac{ESS}{N}}, \qquad ESS = \frac{\big(\sum_i w_i\big)^2}{\sum_i w_i^2}

    1 for equal weights, and :math:`1 / \sqrt N` if a single sample has all the weight. Without
    samples, or with weights of zero alone, it is 1.

    Args:
        weights: ``[N]``, importance weights; not negative. Their scale does not matter.

    Returns:
        Scalar float64.

    Source: VCPO (arXiv 2602.17616), the effective sample size in the step size.
    """
    weights = weights.double()
    squared = weights.square().sum() * weights.numel()
    return torch.where(squared > 0, weights.sum() / squared.clamp(min=1e-300).sqrt(), 1.0)
