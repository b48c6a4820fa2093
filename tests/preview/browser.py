"""A real Chromium for the tests of pages, and pages that note whatever a user would call broken."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

CONTRAST = """(selector) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (css) => {
    canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const css = getComputedStyle(node).backgroundColor;
    return css === 'rgba(0, 0, 0, 0)' ? behind(node.parentElement) : css;
  };
  let worst = [99, ''];
  for (const node of document.querySelectorAll(selector)) {
    const style = getComputedStyle(node), ink = node instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.outerHTML.slice(0, 200)];
  }
  return worst;
}"""
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


def worst_contrast(page: Page, selector: str) -> tuple[float, str]:
    """Of the text that ``selector`` finds the least contrast with what is behind it, and where (WCAG 2.2, 1.4.3)."""
    ratio, where = page.evaluate(CONTRAST, selector)
    return ratio, where
