"""Pages in headless Chromium: pip's `playwright` drives the Chromium of the system, so nothing else is downloaded."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The sandbox needs privileges that containers lack; the pages are our own files.
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@dataclasses.dataclass
class Opened:
    """A page that is open.

    Attributes:
        page: playwright's `Page`.
        errors: console errors and uncaught exceptions so far.
        requests: addresses other than the page's own that it asked for.
    """

    page: Any
    errors: list[str] = dataclasses.field(default_factory=list)
    requests: list[str] = dataclasses.field(default_factory=list)


def chromium() -> str | None:
    """Path of the system's Chromium, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def _note(address: str, own: str, requests: list[str]) -> None:
    if address.partition("#")[0] != own and not address.startswith("data:"):
        requests.append(address)


# Not for the whole session: while it is open, playwright's event loop counts as running and `asyncio.run` refuses.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless browser for the tests of a module; skips where it cannot be had."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'fxresu[dev]'")
    path = chromium()
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with driver.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=path, args=_FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """`open_page(path, width=1280, height=800, dark=False) -> Opened`.

    At the end of the test no page may have met an error or asked for another file or the network. A test that expects
    one clears `errors` or `requests`.
    """
    found: list[tuple[Any, Opened]] = []

    def start(path: Path, width: int = 1280, height: int = 800, dark: bool = False) -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        own = path.resolve().as_uri()
        opened = Opened(context.new_page())
        found.append((context, opened))
        opened.page.on("console", lambda m: opened.errors.append(m.text) if m.type == "error" else None)
        opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.page.on("request", lambda r: _note(r.url, own, opened.requests))
        opened.page.goto(own)
        return opened

    yield start
    for context, _ in found:
        context.close()
    for _, opened in found:
        assert not opened.errors, f"the page reported errors: {opened.errors}"
        assert not opened.requests, f"the page asked for {opened.requests}"
