import re

from skyrl_async.metrics.names import METRICS, charts, find, is_idle_part, markdown_table


def test_names_are_unique_and_written_by_the_rule():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    word = r"([a-z0-9_]|<[a-z]+>)+"
    assert all(re.fullmatch(rf"{word}(/{word})*", name) for name in names)


def test_a_placeholder_stands_for_one_word():
    assert find("idle/learner/wait_batch_fraction").section == "idle"
    assert find("dropped/stale").name == "dropped/<reason>"
    assert find("dropped/stale/much") is None
    assert find("reward/mean_of_something") is None


def test_every_section_of_the_layout_has_charts_and_no_metric_is_drawn_twice():
    layout = charts()
    assert list(layout) == [
        "train",
        "fine-tuning",
        "off-policy",
        "staleness",
        "throughput",
        "idle",
        "sync",
        "buffer",
    ]
    patterns = [
        pattern for section in layout.values() for tags in section.values() for pattern in tags
    ]
    assert len(set(patterns)) == len(patterns)
    assert layout["train"]["reward"][0] == "reward/mean$"


def test_idle_parts_are_told_by_their_name():
    assert is_idle_part("wait_batch")
    assert is_idle_part("idle")
    assert not is_idle_part("train")


def test_the_markdown_table_has_a_row_for_every_metric():
    rows = markdown_table().splitlines()
    assert len(rows) == 2 + len(METRICS)
    assert all(row.count("|") == 4 for row in rows)
