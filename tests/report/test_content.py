"""What the page of a run says, from real and broken folders."""

import json
import random
from pathlib import Path

import pytest

from benchmarks.synthetic_run import metrics_of, write_run
from skyrl_async.report import content as report_content
from skyrl_async.report.content import Known, RunContent, label_of, shorten
from skyrl_async.report.run_files import MAX_SAMPLE_STEPS, config_rows
from skyrl_async.report.wording import DROPS
from skyrl_async.types import DropReason


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, steps=120)
    return folder


def test_every_reason_to_drop_a_group_is_explained():
    assert set(DROPS) == set(DropReason)


def test_a_finished_run_is_told_from_its_summary(finished):
    content = RunContent(finished).read()
    tiles = {tile["label"]: tile for tile in content["tiles"]}
    assert content["status"] == "finished"
    assert tiles["held-out reward"]["value"] == "1.00"
    assert tiles["steps"]["value"] == "120 of 120"
    assert tiles["largest staleness"]["value"] == "4, bound 4"
    assert content["dropped"][0]["reason"] == "stale"
    assert content["dropped"][0]["groups"] == 12
    assert [role["role"] for role in content["idle"]] == ["learner", "engine", "actor"]
    for role in content["idle"]:
        assert sum(part["share"] for part in role["parts"]) == pytest.approx(1, abs=1e-3)


def test_a_broken_bound_is_not_shown_as_all_well(tmp_path):
    write_run(tmp_path / "run", steps=3)
    row = {"step": 4, "time_s": 9.0, "staleness/histogram": {"5": 1}}
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    tiles = {t["label"]: t for t in RunContent(tmp_path / "run").read()["tiles"]}
    assert tiles["largest staleness"]["value"] == "5, bound 4"
    assert not tiles["largest staleness"]["good"]


def test_every_metric_has_one_chart(finished):
    content = RunContent(finished).read()
    drawn = [line["name"] for chart in content["charts"] for line in chart["lines"]]
    drawn += [part["name"] for role in content["idle"] for part in role["parts"]]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == set(content["series"]["values"]) - {"step", "time_s"}


def test_a_run_that_goes_on_names_its_waste_and_has_no_status_yet(tmp_path):
    write_run(tmp_path / "run", steps=30, finished=False)
    content = RunContent(tmp_path / "run").read()
    assert content["status"] == "unfinished"
    assert "%" in content["waste"]["text"] and content["waste"]["knob"]
    assert content["dropped"] == []


def test_news_are_the_rest_of_the_lines_and_changed_parts_only(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, steps=50, finished=False)
    content = RunContent(folder)
    first = content.read(slow_parts=False)
    assert "samples" not in first and first["parts"] == 0
    second = content.read(Known(stride=1, buckets=50, parts=0))
    assert second["samples"] and second["config"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_of(51, random.Random(1))) + "\n")
    third = content.read(Known(stride=1, buckets=50, parts=second["parts"]))
    assert third["series"]["rows"] == 51
    assert third["series"]["values"]["step"]["mean"] == [51]
    assert "samples" not in third
    assert content.read(Known(stride=2, buckets=25, parts=0))["series"]["first"] == 0


def test_a_run_that_ends_while_it_is_read_is_shown_to_its_last_step(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write_run(folder, steps=5, finished=False)
    content = RunContent(folder)
    read = report_content.read_mapping

    def ends_meanwhile(path):
        if path.name == "config.yaml":
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics_of(6, random.Random(6))) + "\n")
            (folder / "summary.json").write_text(json.dumps({"status": "finished", "steps": 6}))
        return read(path)

    monkeypatch.setattr(report_content, "read_mapping", ends_meanwhile)
    shown = content.read()
    assert shown["status"] == "finished"
    assert shown["series"]["rows"] == 6


def test_samples_are_of_steps_over_the_whole_run(finished):
    samples = RunContent(finished).read()["samples"]
    versions = sorted({s["train_version"] for s in samples})
    assert versions[0] == 0 and versions[-1] == 100
    assert len(versions) <= MAX_SAMPLE_STEPS


def test_what_differs_from_the_defaults_is_marked():
    rows = config_rows({"seed": 3, "staleness": {"max": 2}, "sampling": {"nonsense": 1}})
    by_key = {row["key"]: row for row in rows}
    assert by_key["seed"]["default"] == "0" and by_key["seed"]["value"] == "3"
    assert by_key["staleness.max"]["default"] is None
    assert "unknown" in by_key["sampling.nonsense"]["default"]


def test_actions_of_the_guard_come_with_their_cause(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        '{"step": 7, "guard/lower_rate": 0}\n{"step": 8, "guard/lower_rate": 1}\n'
    )
    (folder / "run.log").write_text(
        "x WARNING y: step 7: collapse guard: lower rate, because of ESS 0.01\n"
    )
    assert RunContent(folder).read()["guard"] == [
        {"step": 8, "action": "lower rate", "cause": "ESS 0.01"}
    ]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff", "a: [", "null"])
def test_files_that_cannot_be_read_leave_gaps_and_no_error(tmp_path, text):
    for name in ("config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl", "run.log"):
        (tmp_path / name).write_text(text)
    content = RunContent(tmp_path).read()
    assert (content["status"], content["series"]["rows"]) == ("unfinished", 0)


def test_labels_are_short_and_apart():
    assert label_of("throughput/generated_tokens_per_s") == "generated tokens"
    assert label_of("eval/reward_mean") == "held-out reward mean"
    lines = [{"label": label_of(f"offpolicy/importance_weight_{x}")} for x in ("mean", "max")]
    shorten(lines)
    assert [line["label"] for line in lines] == ["mean", "max"]
    equal = [{"label": "a"}, {"label": "a"}]
    shorten(equal)
    assert equal == [{"label": "a"}, {"label": "a"}]
