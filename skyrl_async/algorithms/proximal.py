"""The proximal policy without a forward pass: interpolated between behavior and current policy.

Shapes: ``T`` loss tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def interpolated_proximal(
    current_logprobs: Tensor,
    behavior_logprobs: Tensor,
    *,
    policy_versions: Tensor,
    current_version: float,
    proximal_version: float,
) -> Tensor:
    r"""Return ``[T]``: approximate logprobs of the proximal policy, without gradient.

    .. math::

        a_t &= \frac{v_{prox} - v_{behav,t}}{v_\theta - v_{behav,t}} \\
        \log\pi_{prox,t} &\approx (1 - a_t) \log\pi_{behav,t} + a_t \log\pi_\theta

    At a = 0 the behavior logprob is returned, at a = 1 the current one, both to the last bit.

    Versions count what the weights have been through, on one scale for all three. A step that
    starts from version v and makes n updates has its u-th forward pass (u = 0 .. n - 1) at
    ``current_version = v + u / n`` and ``proximal_version = v``: the first pass is the start of
    the step itself, so a = 1 and the approximation is exact. With the convention that the pass
    belongs to the version it will produce, ``current_version = v + 1`` and
    ``proximal_version = v``: a token k versions behind the pass has a = 1 - 1/k. Passing v for
    both in every pass would set a = 1 throughout, and a policy ratio of 1 without a trust region.

    A token sampled by the current version itself has 0/0. Then all three policies are the same
    weights, and a = 1: the policy ratio is 1, and what is left between proximal and behavior is
    the engine's numerics, which the importance weight corrects.

    Args:
        current_logprobs: ``[T]``, of the weights being differentiated.
        behavior_logprobs: ``[T]``, as the engine reported them.
        policy_versions: ``[T]``, of the weights that sampled each token.
        current_version: of the weights being differentiated.
        proximal_version: of the weights at the start of the step.

    Raises:
        ValueError: if ``proximal_version`` is above ``current_version``, or a token's version is
            above ``proximal_version``: nothing lies between them to interpolate.

    Source: A-3PO (arXiv 2512.06547); a = 1 - 1/k there, for a proximal policy one version back.
    """
    if not proximal_version <= current_version:
        bound = f"at most current_version {current_version}"
        raise ValueError(f"proximal_version must be {bound}, got {proximal_version}")
    newest = policy_versions.max().item() if policy_versions.numel() else proximal_version
    if not newest <= proximal_version:
        raise ValueError(
            f"policy_versions must be at most proximal_version {proximal_version}, got {newest}"
        )
    versions = policy_versions.to(torch.float64)
    distance = current_version - versions
    share = (proximal_version - versions) / distance
    share = share.masked_fill(distance == 0, 1.0).to(current_logprobs.dtype)
    between = behavior_logprobs + share * (current_logprobs - behavior_logprobs)
    exact = torch.where(share == 1, current_logprobs, behavior_logprobs)
    return torch.where((share == 0) | (share == 1), exact, between)
