"""The losses as their papers write them, on float64 scalars with exact derivatives.

A loss is a function of the tokens of one sequence and the index t of a token in it. Numbers that
depend on the logprobs being differentiated are dual numbers, and ``sg`` cuts their derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from skyrl_async.algorithms.tokens import LossTokens, TokenLoss

# current, proximal and behavior logprob, advantage
Row = tuple[float, float, float, float]

LOGPROB = st.floats(-6, -0.01)
ADVANTAGE = st.one_of(st.just(0.0), st.floats(-3, 3))
BATCH = st.lists(
    st.lists(st.tuples(LOGPROB, LOGPROB, LOGPROB, ADVANTAGE), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@dataclass(frozen=True)
class Dual:
    value: float
    slope: float = 0.0

    def __add__(self, other: Dual | float) -> Dual:
        other = dual(other)
        return Dual(self.value + other.value, self.slope + other.slope)

    def __mul__(self, other: Dual | float) -> Dual:
        other = dual(other)
        return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope)

    def __sub__(self, other: Dual | float) -> Dual:
        return self + -dual(other)

    def __truediv__(self, other: Dual | float) -> Dual:
        other = dual(other)
        quotient = self.value / other.value
        return Dual(quotient, (self.slope - quotient * other.slope) / other.value)

    def __pow__(self, power: float) -> Dual:
        return Dual(self.value**power, power * self.value ** (power - 1) * self.slope)


def dual(number: Dual | float) -> Dual:
    return number if isinstance(number, Dual) else Dual(number)


def sg(x: Dual) -> Dual:
    return Dual(x.value)


def exp(x: Dual) -> Dual:
    return Dual(math.exp(x.value), math.exp(x.value) * x.slope)


def minimum(x: Dual, y: Dual | float) -> Dual:
    return min(x, dual(y), key=lambda number: number.value)


def maximum(x: Dual, y: Dual | float) -> Dual:
    return max(x, dual(y), key=lambda number: number.value)


def clip(x: Dual, low: float, high: float) -> Dual:
    return minimum(maximum(x, low), high)


@dataclass(frozen=True)
class Token:
    current: Dual
    proximal: float
    behavior: float
    advantage: float

    @property
    def r(self) -> Dual:
        return exp(self.current - self.proximal)

    @property
    def w(self) -> Dual:
        return exp(self.current - self.behavior)


LiteralLoss = Callable[[Sequence[Token], int], Dual]


def ppo(y, t, ratio, low, high):
    A = y[t].advantage
    return -minimum(ratio * A, clip(ratio, 1 - low, 1 + high) * A)


def ppo_clip(y, t, *, low, high):
    return ppo(y, t, y[t].r, low, high)


def ppo_behavior(y, t, *, low, high):
    return ppo(y, t, y[t].w, low, high)


def dual_clip(y, t, *, low, high, c):
    A = y[t].advantage
    J = -ppo(y, t, y[t].r, low, high)
    return -maximum(J, c * A) if A < 0 else -J


def cispo(y, t, *, lowest, highest):
    return -(sg(clip(y[t].r, lowest, highest)) * y[t].advantage * y[t].current)


def sapo(y, t, *, tau_pos, tau_neg):
    A = y[t].advantage
    tau = tau_pos if A > 0 else tau_neg
    sigma = Dual(1.0) / (exp((y[t].r - 1) * -tau) + 1)
    return -(sigma * (4 / tau) * A)


def reinforce(y, t):
    return -(y[t].current * y[t].advantage)


def kimi_squared_log(y, t, *, b):
    return reinforce(y, t) + (y[t].current - y[t].proximal) ** 2 * (b / 2)


def reinforce_is(y, t, *, cap):
    return -(sg(minimum(y[t].w, cap)) * y[t].advantage * y[t].current)


def dppo_tv(y, t, *, low, high):
    A = y[t].advantage
    p, mu = math.exp(y[t].current.value), math.exp(y[t].behavior)
    M = 0.0 if (A > 0 and p - mu > high) or (A < 0 and p - mu < -low) else 1.0
    return -(y[t].w * A * M)


def dppo_kl(y, t, *, low, high):
    A = y[t].advantage
    p, mu = math.exp(y[t].current.value), math.exp(y[t].behavior)
    kl = mu * math.log(mu / p) + (1 - mu) * math.log((1 - mu) / (1 - p))
    M = 0.0 if (A > 0 and p > mu and kl > high) or (A < 0 and p < mu and kl > low) else 1.0
    return -(y[t].w * A * M)


def double_sided(y, t, *, low, high):
    w = y[t].w
    f = w if 1 - low < w.value < 1 + high else Dual(0.0)
    return -(sg(f) * y[t].advantage * y[t].current)


def topr_token(y, t):
    A = y[t].advantage
    alpha = Dual(1.0) if A > 0 else sg(minimum(y[t].w, 1.0))
    return -(alpha * A * y[t].current)


def m2_kept(log_ratios: Sequence[float], advantages: Sequence[float], limit: float) -> list[bool]:
    kept = [True] * len(log_ratios)
    K = [
        t
        for t, (x, A) in enumerate(zip(log_ratios, advantages, strict=True))
        if (A > 0 and math.exp(x) > 1) or (A < 0 and math.exp(x) < 1)
    ]
    while K and sum(log_ratios[t] ** 2 for t in K) / len(K) > limit:
        largest = max(K, key=lambda t: log_ratios[t] ** 2)
        kept[largest] = False
        K.remove(largest)
    return kept


def geometric_mean_ratio(y: Sequence[Token]) -> Dual:
    product = Dual(1.0)
    for token in y:
        product = product * token.r
    return product ** (1 / len(y))


def gspo(y, t, *, low, high):
    own = exp(y[t].current - sg(y[t].current))
    return ppo(y, t, sg(geometric_mean_ratio(y)) * own, low, high)


def gspo_objective(y, *, low, high):
    """The objective of GSPO for one sequence, equation 5, negated; not its token form."""
    return ppo(y, 0, geometric_mean_ratio(y), low, high)


def gmpo_clipped_ratio(token, *, low, high):
    sign = math.copysign(1.0, token.advantage)
    bound = math.exp(high if sign > 0 else low)
    return minimum(token.r**sign, bound) ** sign


def gmpo(y, t, *, low, high):
    product = Dual(1.0)
    for token in y:
        ratio = gmpo_clipped_ratio(token, low=low, high=high) if token.advantage else token.r
        product = product * ratio
    own = y[t].r if not y[t].advantage else gmpo_clipped_ratio(y[t], low=low, high=high)
    return -(sg(product ** (1 / len(y))) * own / sg(own) * y[t].advantage)


def gmpo_objective(y, *, low, high):
    """The objective of GMPO for one sequence, negated; not its token form."""
    product = Dual(1.0)
    for token in y:
        product = product * gmpo_clipped_ratio(token, low=low, high=high)
    return -(product ** (1 / len(y)) * y[0].advantage)


def product_weight(y: Sequence[Token]) -> Dual:
    W = Dual(1.0)
    for token in y:
        W = W * token.w
    return W


def vespo(y, t, *, positive, negative):
    A = y[t].advantage
    k, lam = negative if A < 0 else positive
    W = product_weight(y).value
    phi = math.exp(lam) * W**k * math.exp(-lam * W)
    return -(y[t].current * (phi * A))


def topr(y, t):
    A = y[t].advantage
    alpha = 1.0 if A > 0 else min(product_weight(y).value, 1.0)
    return -(y[t].current * (alpha * A))


def sequence_of(rows: Sequence[Row], *, seed: int | None = None) -> list[Token]:
    """Return tokens; the current logprob with index ``seed`` is the one differentiated."""
    return [
        Token(Dual(current, float(index == seed)), proximal, behavior, advantage)
        for index, (current, proximal, behavior, advantage) in enumerate(rows)
    ]


def literal_values(loss: LiteralLoss, batch: Sequence[Sequence[Row]]) -> list[float]:
    return [loss(sequence_of(rows), t).value for rows in batch for t in range(len(rows))]


def literal_gradients(loss: LiteralLoss, batch: Sequence[Sequence[Row]]) -> list[float]:
    """Return the derivative of the sum of the losses by each current logprob."""
    return [
        sum(loss(sequence_of(rows, seed=u), t).slope for t in range(len(rows)))
        for rows in batch
        for u in range(len(rows))
    ]


def loss_tokens(
    batch: Sequence[Sequence[Row]], *, dtype: torch.dtype = torch.float64
) -> LossTokens:
    rows = [row for sequence in batch for row in sequence]
    columns = torch.tensor(rows, dtype=dtype).reshape(-1, 4).T.contiguous()
    ids = [index for index, sequence in enumerate(batch) for _ in sequence]
    return LossTokens(
        current_logprobs=columns[0].clone().requires_grad_(),
        proximal_logprobs=columns[1].clone(),
        behavior_logprobs=columns[2].clone(),
        advantages=columns[3].clone(),
        sequence_ids=torch.tensor(ids, dtype=torch.int64),
        num_sequences=len(batch),
    )


def gradients(result: TokenLoss, tokens: LossTokens) -> list[float]:
    """Return the derivative of the sum of the losses by each current logprob."""
    (gradient,) = torch.autograd.grad(result.loss.sum(), tokens.current_logprobs)
    return gradient.tolist()


def random_batch(
    lengths: Sequence[int], *, seed: int, spread: float = 1.5, on_policy: bool = False
) -> list[list[Row]]:
    generator = torch.Generator().manual_seed(seed)

    def row() -> Row:
        behavior = -0.05 - 4 * torch.rand((), generator=generator).item()
        steps = torch.randn(2, generator=generator, dtype=torch.float64) * spread
        proximal = min(behavior + steps[0].item(), -0.01)
        current = min(proximal + steps[1].item(), -0.01)
        advantage = torch.randn((), generator=generator, dtype=torch.float64).item()
        if on_policy:
            return behavior, behavior, behavior, advantage
        return current, proximal, behavior, advantage

    return [[row() for _ in range(length)] for length in lengths]
