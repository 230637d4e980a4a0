import base64
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from skyrl_async.timeline.__main__ import main
from skyrl_async.timeline.page import levels, page, page_data
from skyrl_async.timeline.reader import Span, Trace, read_trace
from tests.timeline.traces import lane, trace, write_small_run

CHROMIUM = Path("/usr/bin/chromium")
EVIL = '</script><script>alert(1)</script><img src="https://example.org/x.png">'


def data_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_columns_say_what_the_spans_say(tmp_path):
    write_small_run(tmp_path)
    data = page_data(read_trace(tmp_path))

    learner = data["lanes"][0]
    spans = []
    at = 0
    for i, delta in enumerate(learner["start"]):
        at += delta
        name, args = data["names"][learner["name"][i]], data["args"][learner["args"][i]]
        spans.append((name, at, learner["duration"][i], learner["level"][i], args))
    assert spans == [
        ("wait", 0, 1_000_000, 0, {}),
        ("learner step", 1_000_000, 2_000_000, 0, {"policy_version": 1}),
        ("train", 1_000_000, 2_000_000, 1, {}),
    ]
    assert data["flows"] == [
        {
            "version": 1,
            "engine": "rollout actor 0",
            "stops": [[0, 3_000_000], [1, 3_000_000], [2, 3_500_000]],
        }
    ]
    assert (data["end"], data["left_out"]) == (3_500_000, 0)


def test_of_a_long_run_every_actor_keeps_its_first_slots():
    def slot(actor: int, number: int):
        spans = [("generate", i, i + 1.0) for i in range(10)]
        return lane(*spans, process=f"actor {actor}", role="slot", name=f"slot {number}")

    lanes = [slot(0, 0), slot(0, 1), lane(("decode", 0, 9)), slot(1, 0), slot(1, 1), slot(1, 2)]
    data = page_data(trace(*lanes), max_spans=35)
    shown = [(one["process"], one["label"]) for one in data["lanes"]]
    assert shown == [
        ("actor 0", "slot 0"),
        ("p", "n"),
        ("actor 1", "slot 0"),
        ("actor 1", "slot 1"),
    ]
    assert data["left_out"] == 2


def test_levels_count_the_spans_around():
    spans = [Span("a", 0, 10), Span("b", 0, 4), Span("c", 1, 4), Span("d", 4, 9), Span("e", 10, 11)]
    assert levels(spans) == [0, 1, 2, 1, 0]
    assert levels([Span("a", 0, 4), Span("b", 3, 5)]) == [0, 0]  # beside it, not inside


def test_the_page_asks_nobody_and_no_text_of_a_run_becomes_a_script():
    evil = trace(lane((EVIL, 0, 1), process=EVIL, name=EVIL))
    text = page(evil, title=EVIL, note=EVIL)
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text and "@" + "DATA@" not in text
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:|url\(|@import|fetch\(|XMLHttp""", text)
    assert data_of(text)["lanes"][0]["process"] == EVIL
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none';")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy[1]


def test_the_command_writes_both_files_and_says_where_the_time_went(tmp_path, capsys):
    write_small_run(tmp_path)
    (tmp_path / "summary.json").write_text(
        '{"largest_waste": {"text": "the learner waits <a lot>"}}'
    )

    assert main([str(tmp_path)]) == 0

    assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    text = (tmp_path / "timeline.html").read_text()
    assert "Largest waste: the learner waits &lt;a lot&gt;." in text
    printed = capsys.readouterr().out
    assert re.search(r"learner +train 57 % +wait 29 % +idle 14 %", printed)
    assert str(tmp_path / "timeline.html") in printed


def test_the_command_can_write_elsewhere(tmp_path):
    write_small_run(tmp_path)
    assert main([str(tmp_path), "--output", str(tmp_path / "a" / "b")]) == 0
    assert (tmp_path / "a" / "b" / "timeline.html").exists()
    assert not (tmp_path / "timeline.html").exists()


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_a_timeline_is_refused(tmp_path, capsys, folder):
    assert main([str(tmp_path / folder)]) == 2
    assert str(tmp_path / folder) in capsys.readouterr().err


def drawn_page(url: str, profile: Path) -> str:
    """Return the page as it is after a browser has drawn it."""
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--no-first-run", "--window-size=1200,800"),
        *(f"--disable-{what}" for what in quiet),
        *(f"--user-data-dir={profile}", "--dump-dom", url),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "<body" in done.stdout, done.stderr
    return done.stdout


def body_of(url: str, profile: Path) -> dict[str, str]:
    """Return the data attributes of the page's body after a browser has drawn it."""
    body = re.search(r"<body([^>]*)>", drawn_page(url, profile))
    assert body is not None
    return dict(re.findall(r'data-([\w-]+)="([^"]*)"', body[1]))


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium")
def test_a_browser_draws_every_lane(tmp_path):
    write_small_run(tmp_path)
    text = page(read_trace(tmp_path), title="t")
    (tmp_path / "t.html").write_text(text)
    url = (tmp_path / "t.html").as_uri()

    drawn = body_of(f"{url}#3.05-3.3", tmp_path / "profile")

    # Four lanes and the band of the slots.
    assert (drawn["lanes"], drawn["spans"]) == ("5", "8")
    assert drawn["window"] == "3050000-3300000"
    # Of them only the transfer goes on then: a row of 20 pixels beside the names.
    assert int(drawn["pixels"]) == (1200 - 190) * 20


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs /usr/bin/chromium")
def test_a_browser_draws_the_coordinator_without_shares(tmp_path):
    waiting = lane(("wait", 0, 4), process="coordinator", role="coordinator")
    learning = lane(("train", 0, 3), process="learner 0", role="learner")
    (tmp_path / "t.html").write_text(page(trace(waiting, learning), title="t"))

    drawn = drawn_page((tmp_path / "t.html").as_uri(), tmp_path / "profile")

    assert re.findall(r'<div class="role"><b>(\w+)</b>', drawn) == ["learner"]
    assert 'data-lanes="2"' in drawn


def test_an_empty_trace_makes_a_page():
    empty = Trace(lanes=(), start_wall_s=0.0, end_s=0.0)
    assert data_of(page(empty, title="t"))["lanes"] == []
