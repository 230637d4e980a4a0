import json

import numpy as np
import pytest

from skyrl_async.distribution import parse_distribution


def draws(text: str, count: int = 20_000) -> np.ndarray:
    return parse_distribution(text).draw(np.random.default_rng(0), count)


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("fixed:7", 7.0, 0.0),
        ("uniform:2,4", 3.0, 2 / 12**0.5),
        ("exponential:5", 5.0, 5.0),
        # The standard deviation of a lognormal is mean * sqrt(exp(sigma^2) - 1).
        ("lognormal:10,0.5", 10.0, 10 * (np.exp(0.25) - 1) ** 0.5),
    ],
)
def test_draws_have_the_mean_and_spread_of_their_name(text, mean, std):
    values = draws(text)
    assert parse_distribution(text).mean == mean
    assert values.shape == (20_000,)
    assert values.mean() == pytest.approx(mean, rel=0.03)
    assert values.std() == pytest.approx(std, rel=0.05, abs=1e-9)


def test_a_lognormal_is_cut_at_its_largest():
    values = draws("lognormal:10,2,25")
    assert values.max() == 25
    assert (values == 25).mean() > 0.05


def test_recorded_values_are_drawn_from_the_lines_that_have_the_field(tmp_path):
    file = tmp_path / "recorded.jsonl"
    rows = [{"tokens": 3, "latency_s": 0.5}, {"tokens": 9}, {"other": 1}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(draws(f"trace:{file},tokens").tolist()) == {3.0, 9.0}
    assert set(draws(f"trace:{file},latency_s").tolist()) == {0.5}
    with pytest.raises(ValueError, match="at least one line with 'missing'"):
        parse_distribution(f"trace:{file},missing")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gauss:1,2", "is no distribution; give fixed:VALUE"),
        ("fixed:", "needs numbers"),
        ("fixed:1,2", "has 2 numbers"),
        ("lognormal:5", "has 1 numbers"),
        ("fixed:-1", "must be finite and >= 0"),
        ("exponential:inf", "must be finite and >= 0"),
        ("uniform:3,2", "LOW=3 must not be above HIGH=2"),
        ("trace:nowhere.jsonl", "needs a file and a field"),
        ("trace:nowhere.jsonl,tokens", "cannot read numbers"),
    ],
)
def test_another_form_is_refused_with_the_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_distribution(text)
