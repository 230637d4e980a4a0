import math
import re

import pytest
import torch

from skyrl_async.algorithms.distillation import DistillationSettings, on_policy_distillation


def test_the_literal_formula_token_by_token():
    torch.manual_seed(0)
    advantages, student, teacher = torch.randn(3, 50, dtype=torch.float64).unbind()
    student, teacher = -8 * student.square(), -8 * teacher.square()
    settings = DistillationSettings(coefficient=0.3, reward_weight=0.7, max_log_ratio=4.0)
    result = on_policy_distillation(
        advantages, student_logprobs=student, teacher_logprobs=teacher, settings=settings
    )
    limited = 0
    for t in range(50):
        ratio = float(teacher[t] - student[t])
        limited += abs(ratio) > 4
        expected = 0.7 * float(advantages[t]) + 0.3 * max(-4.0, min(4.0, ratio))
        assert float(result[t]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert 5 < limited < 45


def test_by_default_the_teacher_alone_counts():
    result = on_policy_distillation(
        torch.tensor([5.0, -5.0]),
        student_logprobs=torch.tensor([-1.0, -2.0]),
        teacher_logprobs=torch.tensor([-1.5, -0.5]),
        settings=DistillationSettings(),
    )
    assert result.tolist() == pytest.approx([-0.5, 1.5])


def test_without_a_limit_a_token_that_the_teacher_excludes_counts_fully():
    result = on_policy_distillation(
        torch.zeros(1),
        student_logprobs=torch.tensor([-1.0]),
        teacher_logprobs=torch.tensor([-101.0]),
        settings=DistillationSettings(max_log_ratio=None),
    )
    assert result.item() == -100


def test_the_policy_gradient_is_that_of_the_reverse_divergence():
    """Over all tokens of one context, weighted by the student's own probabilities."""
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 7, dtype=torch.float64).unbind()
    student.requires_grad_(True)
    teacher = teacher.log_softmax(0)
    logprobs = student.log_softmax(0)
    divergence = (logprobs.exp() * (logprobs - teacher)).sum()
    (expected,) = torch.autograd.grad(divergence, student, retain_graph=True)
    advantages = on_policy_distillation(
        torch.zeros(7, dtype=torch.float64),
        student_logprobs=logprobs.detach(),
        teacher_logprobs=teacher,
        settings=DistillationSettings(max_log_ratio=None),
    )
    loss = -(logprobs.detach().exp() * advantages * logprobs).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"coefficient": 0.0}, "coefficient=0.0"),
        ({"coefficient": math.inf}, "coefficient=inf"),
        ({"reward_weight": -1.0}, "reward_weight=-1.0"),
        ({"max_log_ratio": 0.0}, "max_log_ratio=0.0"),
    ],
)
def test_bad_settings_are_refused_by_name(values, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        DistillationSettings(**values)
