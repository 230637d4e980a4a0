"""The page is one file that asks for nothing, and no text of a run can get out of its place."""

import base64
import hashlib
import json
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.synthetic_run import write_run
from skyrl_async.report.__main__ import main
from skyrl_async.report.page import embedded, render
from skyrl_async.report.writing import write_report, write_report_in_time

HOSTILE = '</script><script>document.title="owned"</script><!-- <img src=x onerror=alert(1)>'


def content_of(page: str):
    return json.loads(re.search(r'id="content">(.*?)</script>', page, re.DOTALL)[1])


@given(st.text())
def test_any_text_comes_back_and_ends_no_element(text):
    inside = embedded({"text": text})
    assert "<" not in inside and ">" not in inside
    assert json.loads(inside) == {"text": text}


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        embedded({"a": float("nan")})


def test_hostile_names_stay_text():
    page = render({"kind": "run", "name": HOSTILE, "error": HOSTILE})
    assert HOSTILE not in page
    assert page.count("</script>") == 2
    assert content_of(page)["name"] == HOSTILE


@pytest.mark.parametrize("live", [False, True])
def test_the_policy_lets_only_the_pages_own_script_and_style_in(live):
    page = render({"kind": "run", "name": "x"}, live=live)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "http" not in policy
    assert ("connect-src 'self'" in policy) == live
    for element, directive in (("style", "style-src"), ("script", "script-src")):
        text = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)[-1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


def test_the_page_names_no_address_to_load_from():
    page = render({"kind": "run", "name": "x"})
    addresses = re.findall(r"https?://[^\s\"')]+", page)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # a namespace, not a place
    assert not re.search(r"<(link|img|script)[^>]+(src|href)=\"(?!data:)", page)


def test_the_report_is_written_into_the_run(tmp_path: Path, capsys):
    write_run(tmp_path / "run", steps=5)
    assert main([str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert content_of(path.read_text())["series"]["rows"] == 5
    other = tmp_path / "other.html"
    assert main([str(tmp_path / "run"), "--output", str(other)]) == 0
    assert other.is_file()


def test_a_folder_without_run_or_sweep_is_refused_with_its_name(tmp_path: Path, capsys):
    with pytest.raises(ValueError, match=f"{tmp_path}: holds no run"):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path), "--serve"]) == 2
    assert capsys.readouterr().err.count("holds no run") == 2


def test_a_report_that_fails_or_takes_long_does_not_hold_up_the_run(
    tmp_path: Path, monkeypatch, caplog
):
    assert write_report_in_time(tmp_path, timeout_s=5) is None
    assert "holds no run" in caplog.text

    release = threading.Event()
    monkeypatch.setattr("skyrl_async.report.writing.write_report", lambda folder: release.wait(5))
    assert write_report_in_time(tmp_path, timeout_s=0.05) is None
    release.set()
    assert f"python -m skyrl_async.report {tmp_path}" in caplog.text
