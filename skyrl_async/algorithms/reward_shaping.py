"""Terms added to rewards before advantages are estimated."""

from __future__ import annotations

from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@torch.no_grad()
def kl_in_reward(rewards: Tensor, log_ratios_to_reference: Tensor, *, coefficient: float) -> Tensor:
    r"""Return ``[T]``: token rewards less a penalty for leaving the reference policy.

    .. math:: \tilde r_t = r_t - \beta \log\frac{\pi(a_t)}{\pi_{ref}(a_t)}

    Args:
        rewards: ``[T]``, of tokens; usually zero but for the last token of a reply.
        log_ratios_to_reference: ``[T]``, logprobs of the policy that is to pay, minus the
            reference's.
        coefficient: beta, in units of reward per nat.

    Raises:
        ValueError: if the shapes differ, or the coefficient is negative.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2; per token: Ouyang et al. 2022
    (arXiv 2203.02155), equation 2.
    """
    if rewards.shape != log_ratios_to_reference.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and log ratios "
            f"{tuple(log_ratios_to_reference.shape)} differ in shape; give a reward for every token"
        )
    if not coefficient >= 0:
        raise ValueError(
            f"coefficient={coefficient}: must be at least 0, or distance would be rewarded"
        )
    return rewards - coefficient * log_ratios_to_reference


@overload
def overlong_penalty(length: float, *, max_length: int, buffer: int) -> float: ...
@overload
def overlong_penalty(
    length: NDArray[np.number], *, max_length: int, buffer: int
) -> NDArray[np.float64]: ...
def overlong_penalty(
    length: float | NDArray[np.number], *, max_length: int, buffer: int
) -> float | NDArray[np.float64]:
    r"""Return what is added to the reward of a long reply: 0, falling to -1 over a buffer.

    .. math::

        R(L) = \begin{cases}
            0 & L \le L_{max} - L_{buffer} \\
            (L_{max} - L_{buffer} - L) / L_{buffer} & L_{max} - L_{buffer} < L \le L_{max} \\
            -1 & L_{max} < L
        \end{cases}

    Args:
        length: L, tokens of a reply, or an array of them.
        max_length: tokens from which the penalty is whole.
        buffer: tokens before that, over which it grows.

    Raises:
        ValueError: if the buffer is not within ``1 .. max_length``.

    Source: soft overlong punishment, DAPO (arXiv 2503.14476), equation 13.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(
            f"buffer={buffer}: must be between 1 and max_length={max_length}; the penalty grows "
            "over the last tokens of a reply"
        )
    penalty = np.clip((max_length - buffer - np.asarray(length, dtype=np.float64)) / buffer, -1, 0)
    return penalty if isinstance(length, np.ndarray) else float(penalty)
