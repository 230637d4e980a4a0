"""The interpolated proximal policy: its ends, its versions, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.algorithms.proximal import interpolated_proximal

TOKENS = st.lists(
    st.tuples(st.floats(-6, -0.01), st.floats(-6, -0.01), st.integers(0, 7)), max_size=10
)


def proximal(rows, *, current_version, proximal_version, dtype=torch.float64):
    current, behavior = (
        torch.tensor([row[column] for row in rows], dtype=dtype) for column in (0, 1)
    )
    return interpolated_proximal(
        current.requires_grad_(),
        behavior,
        policy_versions=torch.tensor([row[2] for row in rows], dtype=torch.int64),
        current_version=current_version,
        proximal_version=proximal_version,
    )


@settings(deadline=None, max_examples=100)
@given(rows=TOKENS, behind=st.floats(0, 3))
def test_it_equals_the_literal_interpolation(rows, behind):
    v_prox = 7
    v_current = v_prox + behind
    expected = []
    for current, behavior, version in rows:
        a = 1.0 if v_current == version else (v_prox - version) / (v_current - version)
        expected.append((1 - a) * behavior + a * current)
    result = proximal(rows, current_version=v_current, proximal_version=v_prox)
    assert result.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(rows=TOKENS)
def test_the_first_pass_of_a_step_gives_the_current_logprobs_to_the_last_bit(rows):
    result = proximal(rows, current_version=7, proximal_version=7, dtype=torch.float32)
    assert torch.equal(result, torch.tensor([row[0] for row in rows], dtype=torch.float32))


@settings(deadline=None, max_examples=100)
@given(rows=TOKENS, update=st.floats(0.01, 1))
def test_tokens_of_the_proximal_version_keep_their_behavior_logprobs_to_the_last_bit(rows, update):
    rows = [(current, behavior, 7) for current, behavior, _ in rows]
    result = proximal(rows, current_version=7 + update, proximal_version=7, dtype=torch.float32)
    assert torch.equal(result, torch.tensor([row[1] for row in rows], dtype=torch.float32))


def test_a_proximal_policy_one_version_back_is_the_share_of_the_paper():
    for k in (1, 2, 3, 8):
        (result,) = proximal([(-1.0, -3.0, 8 - k)], current_version=8, proximal_version=7)
        assert result.item() == pytest.approx(-3.0 / k + -1.0 * (1 - 1 / k))


def test_older_tokens_are_closer_to_the_current_policy():
    rows = [(-1.0, -3.0, version) for version in (7, 6, 4, 0)]
    result = proximal(rows, current_version=8, proximal_version=7).tolist()
    assert result == sorted(result)
    assert result[0] == -3.0


def test_tokens_of_the_current_version_have_a_policy_ratio_of_one():
    (result,) = proximal([(-1.0, -1.25, 7)], current_version=7, proximal_version=7)
    assert result.item() == -1.0


def test_the_result_has_no_gradient():
    result = proximal([(-1.0, -2.0, 3)], current_version=8, proximal_version=7)
    assert not result.requires_grad


def test_no_tokens_give_an_empty_result():
    assert proximal([], current_version=8, proximal_version=7).shape == (0,)


@pytest.mark.parametrize(
    ("version", "current_version", "proximal_version", "message"),
    [
        (8, 9, 7, r"policy_versions must be at most proximal_version 7, got 8"),
        (3, 6, 7, r"proximal_version must be at most current_version 6, got 7"),
    ],
)
def test_versions_without_anything_in_between_are_refused(
    version, current_version, proximal_version, message
):
    with pytest.raises(ValueError, match=message):
        proximal(
            [(-1.0, -2.0, version)],
            current_version=current_version,
            proximal_version=proximal_version,
        )
