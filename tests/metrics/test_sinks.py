import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServerAccumulator,
)
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from skyrl_async.metrics.recorder import Recorder
from skyrl_async.metrics.sinks import JsonlSink, TensorBoardSink
from skyrl_async.metrics.values import Histogram

_METRICS = {"step": 1, "reward/mean": 0.5, "policy/grad_norm": None}
_HISTOGRAMS = {"staleness/histogram": {0: 6, 1: 3, 4: 1}}


def _lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def _read(folder):
    """Read as a user's script does."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def _tensor(folder, tag):
    """Read the only value of a tag as the TensorBoard server does, with its step."""
    events = ServerAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors(tag)
    return event.step, tensor_util.make_ndarray(event.tensor_proto)


def test_jsonl_has_one_object_per_step_in_the_file_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, metrics=_METRICS, histograms=_HISTOGRAMS)
    assert _lines(path) == [
        {
            "step": 1,
            "reward/mean": 0.5,
            "policy/grad_norm": None,
            "staleness/histogram": {"0": 6, "1": 3, "4": 1},
        }
    ]
    sink.write(2, metrics={"reward/mean": 0.6}, histograms={})
    assert [line["step"] for line in _lines(path)] == [1, 2]
    sink.close()
    sink.close()


def test_jsonl_refuses_what_is_not_json(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        sink.write(1, metrics={"loss/policy": float("nan")}, histograms={})
    assert _lines(sink.path) == []
    sink.close()


def test_jsonl_does_not_overwrite_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"exists; choose a new run\.dir, or resume"):
        JsonlSink(path)


@pytest.mark.parametrize(
    "rest",
    [
        b'{"step": 3}\n{"step": 4, "rew',
        b"",
        b'{"step": 3',
        b"\x00\x00\x00\x00\n\xff\n",
        b'{"stop": 3}\n[]\n',
    ],
)
def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + rest)
    sink = JsonlSink(path, resume_step=2)
    sink.write(3, metrics={"reward/mean": 0.7}, histograms={})
    sink.close()
    assert _lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "reward/mean": 0.7}]
    assert list(tmp_path.iterdir()) == [path]


def test_jsonl_lines_survive_a_process_that_ends_without_goodbye(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os; from skyrl_async.metrics.sinks import JsonlSink;"
        f"sink = JsonlSink({str(path)!r});"
        "sink.write(1, metrics={'a': 1}, histograms={}); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert _lines(path) == [{"step": 1, "a": 1}]


def test_tensorboard_reads_scalars_back_under_their_names(tmp_path):
    sink = TensorBoardSink(tmp_path)
    recorder = Recorder([sink])
    for step in (1, 2):
        recorder.record("reward/mean", 0.25 * step)
        recorder.record("loss/policy", float("nan"))
        recorder.record("staleness", Histogram({0: 3, 2: 1}))
        recorder.flush(step)
    events = _read(tmp_path)  # before close: a run is watched while it goes on
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert "loss/policy" not in events.Tags()["scalars"]
    assert "staleness/max" in events.Tags()["scalars"]
    assert events.Tags()["histograms"] == ["staleness/histogram"]
    sink.close()
    sink.close()


def test_tensorboard_histograms_have_a_bucket_around_every_integer(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write(7, metrics={}, histograms=_HISTOGRAMS)
    sink.close()
    step, buckets = _tensor(tmp_path, "staleness/histogram")
    assert step == 7
    assert buckets.tolist() == [[-0.5, 0.5, 6], [0.5, 1.5, 3], [1.5, 3.5, 0], [3.5, 4.5, 1]]


def test_tensorboard_groups_the_charts_in_sections(tmp_path):
    TensorBoardSink(tmp_path).close()
    _, content = _tensor(tmp_path, "custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(content.item())
    sections = {category.title: category for category in layout.category}
    assert list(sections) == [
        "train",
        "fine-tuning",
        "off-policy",
        "staleness",
        "throughput",
        "idle",
        "sync",
        "buffer",
    ]
    reward = next(chart for chart in sections["train"].chart if chart.title == "reward")
    assert "eval/reward_mean$" in list(reward.multiline.tag)


def test_a_resumed_run_hides_the_steps_after_its_checkpoint(tmp_path):
    first = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        first.write(step, metrics={"reward/mean": 0.0}, histograms={})
    first.close()
    second = TensorBoardSink(tmp_path, resume_step=2)
    second.write(3, metrics={"reward/mean": 1.0}, histograms={})
    second.close()
    rewards = _read(tmp_path).Scalars("reward/mean")
    assert [(e.step, e.value) for e in rewards] == [(1, 0.0), (2, 0.0), (3, 1.0)]


def test_tensorboard_loads_neither_torch_nor_tensorflow(tmp_path):
    for name in ("torch", "tensorflow"):
        (tmp_path / "trap" / name).mkdir(parents=True)
        (tmp_path / "trap" / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'trap')!r});"
        "from skyrl_async.metrics.sinks import TensorBoardSink;"
        f"sink = TensorBoardSink({str(tmp_path / 'events')!r});"
        "sink.write(1, metrics={'reward/mean': 1.0}, histograms={'staleness/histogram': {0: 1}});"
        "sink.close(); print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert not loaded & {"torch", "tensorflow", "ray"}
    assert "tensorboard.compat.proto.event_pb2" in loaded
    assert len(list(Path(tmp_path / "events").iterdir())) == 1
