"""KL divergence from the reference policy, estimated on sampled tokens; for use inside the loss.

Every function takes ``log_ratios [T]``, current minus reference logprobs, and returns one value for
each token, through which gradient flows. Whether an estimator's *gradient* is that of a divergence
is another question than whether its value is; each docstring answers it for tokens sampled by the
current policy. Off policy, only ``unbiased_k3`` keeps value and gradient. All gradients are of a
token's divergence in its context; none accounts for what the token does to later contexts.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3", "unbiased_k3"]


def k1(log_ratios: Tensor) -> Tensor:
    r"""Return the log ratio: an unbiased value, but no regularizer inside a loss.

    .. math:: k_1 = \log\frac{\pi_\theta}{\pi_{ref}}, \qquad
              \nabla k_1 = \nabla\log\pi_\theta

    On policy the gradient has expectation zero: it is the score alone, and does not even depend on
    the reference. Use it in the reward instead (``kl_in_reward``).

    Args:
        log_ratios: ``[T]``, current minus reference, with gradient.

    Source: Schulman 2020 (joschu.net/blog/kl-approx.html); gradients: arXiv 2510.01555.
    """
    return log_ratios


def k2(log_ratios: Tensor) -> Tensor:
    r"""Return half the squared log ratio: a biased value, the right gradient.

    .. math:: k_2 = \tfrac12 \Big(\log\frac{\pi_\theta}{\pi_{ref}}\Big)^2, \qquad
              \nabla k_2 = \log\frac{\pi_\theta}{\pi_{ref}} \nabla\log\pi_\theta

    On policy the gradient's expectation is that of :math:`KL(\pi_\theta \| \pi_{ref})`.

    Args:
        log_ratios: ``[T]``, current minus reference, with gradient.

    Source: as ``k1``.
    """
    return 0.5 * log_ratios.square()


def k3(log_ratios: Tensor, *, clamp: float | None = None) -> Tensor:
    r"""Return GRPO's non-negative estimator: an unbiased value, the other divergence's gradient.

    .. math:: k_3 = \frac{\pi_{ref}}{\pi_\theta} - 1 - \log\frac{\pi_{ref}}{\pi_\theta}, \qquad
              \nabla k_3 = \Big(1 - \frac{\pi_{ref}}{\pi_\theta}\Big) \nabla\log\pi_\theta

    On policy the gradient's expectation is that of :math:`KL(\pi_{ref} \| \pi_\theta)`. It is
    unbounded where the current policy is far below the reference.

    Args:
        log_ratios: ``[T]``, current minus reference, with gradient.
        clamp: limit of the log ratio's magnitude, for example 10; a token beyond it has no
            gradient. None for no limit.

    Source: as ``k1``; in a loss: GRPO (arXiv 2402.03300), equation 4.
    """
    if clamp is not None:
        log_ratios = log_ratios.clamp(-clamp, clamp)
    return (-log_ratios).expm1() + log_ratios


def unbiased_k3(
    log_ratios: Tensor, *, log_ratios_to_behavior: Tensor, clamp: float | None = None
) -> Tensor:
    r"""Return K3 under an importance weight: unbiased value and gradient on any policy's tokens.

    .. math:: \frac{\pi_\theta}{\pi_{behav}} \, k_3

    The weight keeps its gradient; without it this would be the gradient of ``k3``. Its expectation
    over the behavior policy is :math:`KL(\pi_\theta \| \pi_{ref})`, in value and gradient. Nothing
    truncates the weight here: leave out tokens whose behavior logprob is invalid or far off.

    Args:
        log_ratios: ``[T]``, current minus reference, with gradient.
        log_ratios_to_behavior: ``[T]``, current minus behavior, with gradient.
        clamp: as for ``k3``; the weight of a token beyond it keeps its gradient.

    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 7.
    """
    return log_ratios_to_behavior.exp() * k3(log_ratios, clamp=clamp)


def divergence(
    estimator: KlEstimator,
    log_ratios: Tensor,
    *,
    log_ratios_to_behavior: Tensor,
    clamp: float | None = None,
) -> Tensor:
    """Return ``[T]``: the estimate of that name.

    Args:
        estimator: which.
        log_ratios: ``[T]``, of the policy to the reference.
        log_ratios_to_behavior: ``[T]``, of the policy to the behavior policy; for ``unbiased_k3``.
        clamp: of ``k3`` and ``unbiased_k3``.
    """
    match estimator:
        case "k1":
            return k1(log_ratios)
        case "k2":
            return k2(log_ratios)
        case "k3":
            return k3(log_ratios, clamp=clamp)
        case "unbiased_k3":
            return unbiased_k3(
                log_ratios, log_ratios_to_behavior=log_ratios_to_behavior, clamp=clamp
            )
