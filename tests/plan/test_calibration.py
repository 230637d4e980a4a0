from itertools import pairwise

import numpy as np
import pytest

from skyrl_async.plan.calibration import _episodes, calibrate, fit_nonnegative
from skyrl_async.timeline.reader import Span, TraceLane


def test_the_fit_finds_the_coefficients_that_made_the_values():
    rng = np.random.default_rng(0)
    columns = rng.uniform(0, 10, (50, 3))
    assert fit_nonnegative(columns, columns @ [0.5, 0.0, 2.0]) == pytest.approx([0.5, 0.0, 2.0])


def test_the_fit_has_no_negative_coefficient_and_is_the_best_such():
    rng = np.random.default_rng(1)
    columns = rng.uniform(0, 1, (40, 2))
    values = columns @ [3.0, -1.0] + rng.normal(0, 0.01, 40)
    found = fit_nonnegative(columns, values)
    # Without the second column, the best first coefficient is sum(x y) / sum(x x).
    x = columns[:, 0]
    assert found == pytest.approx([float(x @ values / (x @ x)), 0.0])


def slot(*parts):
    """Return a slot's lane with spans back to back: ``(name, seconds, tokens)`` each."""
    ends = np.cumsum([0.0, *(seconds for _, seconds, _ in parts)]).tolist()
    spans = [
        Span(name, start, end, {"tokens": tokens} if tokens else {})
        for (name, _, tokens), (start, end) in zip(parts, pairwise(ends), strict=True)
        if name != "gap"
    ]
    spans.sort(key=lambda s: (s.start_s, -s.end_s))
    return TraceLane(
        process="p", role="slot", name="slot 0", spans=tuple(spans), instants=(), flows=()
    )


def test_episodes_are_read_from_a_slot():
    lane = slot(
        ("other", 0.1, 0),
        ("environment", 0.2, 0),
        ("other", 0.0, 0),  # starts with the next span, which is sorted before it
        ("generate", 1.0, 7),
        ("environment", 0.5, 0),
        ("other", 0.25, 0),
        ("wait_engine", 3.0, 0),
        ("generate", 1.0, 4),
        ("environment", 0.75, 0),
        ("wait_group", 2.0, 0),
        ("gap", 5.0, 0),
        ("environment", 0.1, 0),
        ("generate", 1.0, 3),
        ("environment", 0.3, 0),
        ("gap", 1.0, 0),
        ("other", 1.0, 0),
    )
    (first, own_s), (second, second_own_s) = _episodes(lane)
    assert first.reply_tokens == (7, 4)
    assert first.waits_s == pytest.approx((0.5, 0.75))
    assert first.first_wait_s == pytest.approx(0.2)
    assert own_s == pytest.approx(0.35)
    assert (second.reply_tokens, second_own_s) == ((3,), 0.0)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be measured"):
        calibrate(tmp_path)
