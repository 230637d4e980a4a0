import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_async.coordination.guard import CollapseGuard, GuardAction, GuardSettings, signs

WELL = {
    "offpolicy/ess_fraction": 0.9,
    "offpolicy/kl_behavior": 0.01,
    "offpolicy/mismatch_kl": 1e-7,
    "offpolicy/clip_fraction": 0.1,
    "policy/entropy": 1.0,
    "learner/skipped_minibatches": 0.0,
    "learner/skipped_steps": 0.0,
    "reward/mean": 0.5,
}
SICK = WELL | {"offpolicy/kl_behavior": 3.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offpolicy/ess_fraction", 0.05),
        ("offpolicy/kl_behavior", 2.0),
        ("offpolicy/mismatch_kl", 0.5),
        ("offpolicy/clip_fraction", 0.6),
        ("policy/entropy", 0.01),
        ("offpolicy/kl_behavior", float("nan")),
        ("learner/skipped_minibatches", 1.0),
        ("learner/skipped_steps", 1.0),
    ],
)
def test_every_sign_names_value_and_limit(name, value):
    (sign,) = signs(WELL | {name: value}, GuardSettings(min_entropy=0.05))
    assert sign.startswith(f"{name} {value:.3g}, limit ")


def test_healthy_and_absent_metrics_are_no_sign():
    assert not list(signs(WELL, GuardSettings()))
    assert not list(signs({}, GuardSettings()))


def test_actions_come_in_order_each_after_the_patience():
    guard = CollapseGuard(GuardSettings(patience_steps=2))
    actions = [guard.observe(SICK).action for _ in range(14)]
    assert actions[::2] == [None] * 7
    assert actions[1::2] == [
        *(GuardAction.WARN, GuardAction.TIGHTEN, GuardAction.LOWER_RATE, GuardAction.ROLLBACK),
        *(GuardAction.TIGHTEN, GuardAction.LOWER_RATE, GuardAction.ROLLBACK),
    ]


def test_a_bound_of_zero_is_not_tightened():
    guard = CollapseGuard(GuardSettings(patience_steps=1))
    actions = [guard.observe(SICK, can_tighten=False).action for _ in range(5)]
    warn, lower, rollback = GuardAction.WARN, GuardAction.LOWER_RATE, GuardAction.ROLLBACK
    assert actions == [warn, lower, rollback, lower, rollback]


@given(st.integers(1, 6))
def test_a_rollback_comes_within_the_steps_that_are_promised(patience):
    guard = CollapseGuard(GuardSettings(patience_steps=patience))
    actions = [guard.observe(SICK).action for _ in range(guard.steps_to_rollback)]
    assert actions[-1] is GuardAction.ROLLBACK and GuardAction.ROLLBACK not in actions[:-1]


def test_one_healthy_step_begins_the_patience_anew():
    guard = CollapseGuard(GuardSettings(patience_steps=2))
    assert all(guard.observe(m).action is None for m in (SICK, WELL, SICK, WELL, SICK))


def test_many_healthy_steps_begin_the_actions_anew():
    guard = CollapseGuard(GuardSettings(patience_steps=1))
    assert guard.observe(SICK).action is GuardAction.WARN
    for _ in range(10):
        guard.observe(WELL)
    assert guard.observe(SICK).action is GuardAction.WARN


def test_a_fall_of_the_reward_is_a_sign_and_noise_is_not():
    guard = CollapseGuard(GuardSettings(patience_steps=1, max_reward_drop=0.3))
    for reward in (0.8, 0.7, 0.85, 0.75):
        assert guard.observe(WELL | {"reward/mean": reward}).action is None
    decisions = [guard.observe(WELL | {"reward/mean": 0.0}) for _ in range(3)]
    causes = [d.cause for d in decisions if d.action is not None]
    assert causes and "reward/mean" in causes[0] and "below its best" in causes[0]


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4))
def test_it_never_acts_without_patience_signs_in_a_row(sick_steps, patience):
    guard = CollapseGuard(GuardSettings(patience_steps=patience))
    run = 0
    for sick in sick_steps:
        decision = guard.observe(SICK if sick else WELL)
        run = run + 1 if sick else 0
        assert (decision.action is not None) == (run > 0 and run % patience == 0)
        assert not (decision.remember and sick)
