import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from skyrl_async.metrics.prometheus import CONTENT_TYPE, PrometheusSink, exposition


def families(text: bytes):
    """Parse as Prometheus does."""
    return {f.name: f for f in text_string_to_metric_families(text.decode())}


def buckets(family):
    return {float(s.labels["le"]): s.value for s in family.samples if s.name.endswith("_bucket")}


def sample(family, suffix=""):
    (value,) = [s.value for s in family.samples if s.name == family.name + suffix]
    return value


def test_metrics_are_gauges_that_say_what_they_mean():
    parsed = families(
        exposition({"step": 7, "reward/mean": 0.25, "idle/engine/swap_fraction": 0.5}, {})
    )
    assert set(parsed) == {
        "skyrl_async_step",
        "skyrl_async_reward_mean",
        "skyrl_async_idle_engine_swap_fraction",
    }
    reward = parsed["skyrl_async_reward_mean"]
    assert reward.type == "gauge"
    assert sample(reward) == 0.25
    assert "mean of all trajectories finished in the step" in reward.documentation
    assert "(fraction)" in parsed["skyrl_async_idle_engine_swap_fraction"].documentation


def test_a_name_outside_the_table_is_its_own_help():
    (family,) = families(exposition({"game/invalid_moves": 3}, {})).values()
    assert family.documentation == "game/invalid_moves"


def test_values_that_were_not_finite_are_left_out():
    assert families(exposition({"policy/grad_norm": None, "step": 1}, {})).keys() == {
        "skyrl_async_step"
    }


def test_staleness_is_a_histogram_with_cumulative_buckets():
    counts = {0: 6, 1: 3, 7: 1, 200: 2}
    family = families(exposition({}, {"staleness/histogram": counts}))[
        "skyrl_async_staleness_histogram"
    ]
    assert family.type == "histogram"
    bounds = buckets(family)
    for bound, value in bounds.items():
        assert value == sum(count for number, count in counts.items() if number <= bound), bound
    assert bounds[math.inf] == 12
    assert sample(family, "_count") == 12
    assert sample(family, "_sum") == 0 * 6 + 1 * 3 + 7 * 1 + 200 * 2


def test_the_sink_shows_the_last_step_and_all_histograms_so_far():
    times = iter([1000.0, 1060.5])
    sink = PrometheusSink(unix_clock=lambda: next(times))
    assert families(sink.exposition()) == {}
    sink.write(1, metrics={"reward/mean": 0.1}, histograms={"staleness/histogram": {0: 4}})
    sink.write(2, metrics={"reward/std": 0.2}, histograms={"staleness/histogram": {0: 1, 2: 5}})
    sink.close()
    parsed = families(sink.exposition())
    assert sample(parsed["skyrl_async_step"]) == 2
    assert sample(parsed["skyrl_async_last_step_timestamp_seconds"]) == 1060.5
    assert "skyrl_async_reward_mean" not in parsed
    assert sample(parsed["skyrl_async_reward_std"]) == 0.2
    bounds = buckets(parsed["skyrl_async_staleness_histogram"])
    assert (bounds[0.0], bounds[1.0], bounds[2.0]) == (5, 5, 10)


def test_names_that_fall_together_are_refused():
    with pytest.raises(ValueError, match=r"reward/a_b, reward/a/b|reward/a/b, reward/a_b"):
        exposition({"reward/a_b": 1, "reward/a/b": 2}, {})


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="count -1 of 3"):
        exposition({}, {"staleness/histogram": {3: -1}})


def test_the_content_type_is_that_of_the_text_format():
    from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

    assert CONTENT_TYPE == CONTENT_TYPE_PLAIN_0_0_4
