"""Pages in headless Chromium, through selenium: how fast they are drawn, and what they ask for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
DRIVER = Path("/usr/bin/chromedriver")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A page that was drawn.

    Attributes:
        drawn_s: from the start of the navigation until the browser had painted it.
        requests: addresses that the page asked for, besides its own.
        problems: severe messages of the browser's console.
    """

    drawn_s: float
    requests: tuple[str, ...]
    problems: tuple[str, ...]


@contextmanager
def browser(*, width: int = 1300, height: int = 900) -> Iterator[Any]:
    """Yield a selenium driver with a fresh profile; the browser is closed afterwards."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        try:
            yield driver
        finally:
            driver.quit()


def load(driver: Any, address: str, *, timeout_s: float = 20.0) -> Loaded:
    """Open a page and wait until it says, by ``data-drawn``, that it was painted.

    Raises:
        TimeoutError: if it does not say so.
    """
    # So that the page before it asks for nothing any more, and its messages are gone.
    driver.get("about:blank")
    _problems(driver)
    driver.get(address)
    deadline_s = time.monotonic() + timeout_s
    while (drawn := _evaluate(driver, "document.documentElement.dataset.drawn")) is None:
        if time.monotonic() > deadline_s:
            problems = "; ".join(_problems(driver)) or "none"
            raise TimeoutError(f"{address}: not drawn after {timeout_s:g} s; messages: {problems}")
        time.sleep(0.01)
    names = _evaluate(driver, "performance.getEntriesByType('resource').map((entry) => entry.name)")
    return Loaded(
        drawn_s=float(drawn) / 1000, requests=tuple(names), problems=tuple(_problems(driver))
    )


def _evaluate(driver: Any, expression: str) -> Any:
    return driver.execute_script(f"return {expression}")


def _problems(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]
