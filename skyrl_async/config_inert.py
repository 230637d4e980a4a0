"""Keys of the algorithm that are set and that nothing reads: refused, lest they seem to work."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_async.config_algorithm import (
    VALUE_ESTIMATORS,
    AlgorithmSection,
    CorrectionSection,
    CriticSection,
    FiltersSection,
    KlSection,
    weight_kind,
)
from skyrl_async.config_section import show, unread

_READERS = {
    "gae_lambda": ("gae", "turn_level_gae", "vtrace", "retrace"),
    "length_adaptive_alpha": ("length_adaptive_gae",),
    "vtrace_rho_cap": ("vtrace",),
    "vtrace_c_cap": ("vtrace",),
}
"""The estimators that read a key of theirs."""


def inert_problems(
    algorithm: AlgorithmSection,
    *,
    correction: CorrectionSection,
    kl: KlSection,
    critic: CriticSection,
    filters: FiltersSection,
) -> Iterator[str]:
    """Yield a line for each key without effect."""
    yield from _unread_by_advantage(algorithm, kl)
    yield from _unread_sections(algorithm, correction, critic, filters)


def _unread_by_advantage(algorithm: AlgorithmSection, kl: KlSection) -> Iterator[str]:
    advantage = f", algorithm.advantage={algorithm.advantage}"
    for name, readers in _READERS.items():
        if algorithm.advantage not in readers:
            why = f"{advantage}: nothing would read it; set {_either(readers)}"
            yield from unread("algorithm", algorithm, (name,), why=why)
    if algorithm.advantage not in VALUE_ESTIMATORS and not kl.in_reward:
        why = (
            f"{advantage}, kl.coefficient={show(kl.coefficient)}, kl.placement={kl.placement}: "
            "nothing would be discounted without a critic or a divergence in the reward; set "
            f"{_either(VALUE_ESTIMATORS)}, or kl.placement=reward with a coefficient"
        )
        yield from unread("algorithm", algorithm, ("gamma",), why=why)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _unread_sections(
    algorithm: AlgorithmSection,
    correction: CorrectionSection,
    critic: CriticSection,
    filters: FiltersSection,
) -> Iterator[str]:
    if critic.kind == "none" and algorithm.advantage not in VALUE_ESTIMATORS:
        why = (
            ", critic.kind=none: there is no critic; set critic.kind=model or head with "
            f"algorithm.advantage of {_either(VALUE_ESTIMATORS)}"
        )
        names = ("learning_rate", "updates", "clip", "bootstrap_truncated")
        yield from unread("critic", critic, names, why=why)
    weight = weight_kind(algorithm, correction)
    if weight == "none":
        why = (
            f", correction.weight={weight}, algorithm.loss={algorithm.loss}: there are no weights "
            "to divide; set correction.weight=auto with a proximal loss such as reinforce"
        )
        yield from unread("correction", correction, ("normalize",), why=why)
    if correction.k2_limit is None and correction.k3_limit is None:
        why = (
            ", correction.k2_limit=null, correction.k3_limit=null: it is the level of these "
            "limits; set one of them"
        )
        yield from unread("correction", correction, ("k_level",), why=why)
    if filters.max_pass_rate is None:
        why = ", filters.max_pass_rate=null: nothing counts who passed; set that rate"
        yield from unread("filters", filters, ("pass_reward",), why=why)
