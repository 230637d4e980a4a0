"""The pages in real Chromium: drawn, quiet on the network, interactive, safe from texts."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from benchmarks.chromium import CHROMIUM, DRIVER, browser, load
from benchmarks.synthetic_run import metrics_of, sample_of, write_run
from skyrl_async.report.server import ReportServer
from skyrl_async.report.writing import write_report
from skyrl_async.sweep.rows import append_row
from tests.report.test_sweep_content import row

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM.exists() and DRIVER.exists()), reason="needs Chromium and its driver"
    ),
]

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def driver():
    pytest.importorskip("selenium")
    with browser() as driver:
        yield driver


def test_a_run_is_drawn_without_asking_for_anything(driver, tmp_path: Path):
    write_run(tmp_path / "run", steps=600)
    page = load(driver, write_report(tmp_path / "run").as_uri())
    assert (page.requests, page.problems) == ((), ())
    run = driver.execute_script
    assert run("return document.querySelectorAll('main .card svg path').length") > 30
    found = "[...document.querySelectorAll('h2')].filter((h) => h.offsetParent)"
    heads = run(f"return {found}.map((h) => h.textContent)")
    wanted = {"Learning", "Staleness", "Throughput", "Where the time goes", "Timeline"}
    assert wanted | {"Sample trajectories", "Dropped groups", "Configuration"} <= set(heads)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert run(overflow) == 0


def test_hovering_a_chart_tells_its_values(driver, tmp_path: Path):
    from selenium.webdriver import ActionChains

    write_run(tmp_path / "run", steps=40)
    load(driver, write_report(tmp_path / "run").as_uri())
    chart = driver.find_element("css selector", "#learning .card svg")
    ActionChains(driver).move_to_element(chart).perform()
    tip = driver.find_element("id", "tip")
    assert tip.is_displayed()
    step = int(re.match(r"step (\d+),", tip.text)[1])
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    value = json.loads(rows[step - 1])["reward/trained_mean"]
    assert f"trained mean {float(f'{value:.3g}'):g}" in tip.text


def test_tokens_change_color_and_tell_what_they_are(driver, tmp_path: Path):
    from selenium.webdriver import ActionChains

    write_run(tmp_path / "run", steps=40)
    load(driver, write_report(tmp_path / "run").as_uri())
    token = "#sample-trajectories .sample .tok:not(.seen):not(.out)"

    def color() -> str:
        return driver.find_element("css selector", token).value_of_css_property("background-color")

    by_version = color()
    buttons = driver.find_elements("css selector", "#sample-trajectories .bar button")
    next(b for b in buttons if b.text == "advantage").click()
    assert color() != by_version
    ActionChains(driver).move_to_element(driver.find_element("css selector", token)).perform()
    text = driver.find_element("id", "tip").text
    for fact in ("logprob", "probability", "sampled by version", "advantage", "in the loss"):
        assert fact in text


def test_hostile_texts_are_shown_as_they_are(driver, tmp_path: Path):
    folder = tmp_path / "run"
    write_run(folder, steps=3, finished=False)
    (folder / "summary.json").write_text(json.dumps({"status": "failed", "error": HOSTILE}))
    sample = sample_of(3, HOSTILE, random.Random(0)) | {"texts": [HOSTILE] * 64}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = load(driver, write_report(folder).as_uri())
    assert (page.requests, page.problems) == ((), ())
    assert driver.title == "number_guess: failed"
    body = driver.find_element("tag name", "body").text
    assert body.count("<img src=x onerror=") > 30


def test_a_live_page_goes_on_with_the_run(driver, tmp_path: Path):
    folder = tmp_path / "run"
    write_run(folder, steps=30, finished=False)
    server = ReportServer(folder)
    page = load(driver, server.start())
    assert page.problems == ()
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(31, 36):
            file.write(json.dumps(metrics_of(step, random.Random(step))) + "\n")
    (folder / "summary.json").write_text(json.dumps({"status": "finished", "steps": 35}))
    deadline_s = time.monotonic() + 10
    while driver.title != "number_guess: finished" and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert driver.title == "number_guess: finished"
    run = driver.execute_script
    assert run("return document.documentElement.dataset.polled") == "35"
    line = "document.querySelector('#learning .card svg path[fill=none]').getAttribute('d')"
    assert len(re.findall("[ML]", run(f"return {line}"))) == 35
    assert run("return document.querySelectorAll('.sample').length") > 0
    server.close()


def test_a_long_run_stays_aligned_when_its_points_are_joined(driver, tmp_path: Path):
    """The page merges news at its end, and takes everything anew when the stride changes."""
    folder = tmp_path / "run"
    write_run(folder, steps=500, finished=False)
    server = ReportServer(folder)
    load(driver, server.start())
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(501, 531):
            file.write(json.dumps(metrics_of(step, random.Random(step))) + "\n")
    deadline_s = time.monotonic() + 10
    polled = "return document.documentElement.dataset.polled"
    while driver.execute_script(polled) != "530" and time.monotonic() < deadline_s:
        time.sleep(0.05)
    text = driver.execute_script("return document.querySelector('#top').textContent")
    assert driver.execute_script(polled) == "530" and "530" in text
    assert load(driver, driver.current_url).problems == ()
    server.close()


def test_a_sweep_is_drawn(driver, tmp_path: Path):
    for method in ("a", HOSTILE):
        for lag in (0, 1, 8):
            append_row(tmp_path, row(1 / (1 + lag), method=method, lag=lag, seed=0))
    page = load(driver, write_report(tmp_path).as_uri())
    assert (page.requests, page.problems) == ((), ())
    assert driver.execute_script("return document.querySelectorAll('svg circle').length") >= 18
    assert driver.title == f"{tmp_path.name}: sweep"
