"""What the console remembers of a run."""

from skyrl_async.metrics.view import RunView


def test_dropped_groups_are_summed_by_reason_without_their_tokens():
    view = RunView("run")
    for step in (1, 2):
        metrics = {"dropped/stale": 3.0, "dropped/generated_tokens": 900.0}
        view.append(step, metrics=metrics, histograms={})
    assert view.dropped == {"stale": 6}
