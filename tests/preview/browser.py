"""A real Chromium for the tests of pages, and pages that note whatever a user would call broken."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextmanager
def chromium() -> Iterator[Browser]:
    """An installed Chromium or Chrome, headless."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    assert executable, f"the tests of the page need a browser, one of {', '.join(NAMES)}: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
    """The page in ``file``. Fails on any message of the console, error, dialog or request beside the file itself."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url == file.as_uri() else faults.append(f"asks {request.url}"))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert not faults, faults
