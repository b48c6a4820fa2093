"""The HTML page in a real browser: what it shows, what it does when used, and that data stays data."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from primus_bridge.preview.page import MOST_TOKENS, html_page
from tests.preview.browser import chromium, opened, worst_contrast
from tests.preview.sequences import chat, preview_of, sequence_of

HOSTILE = (
    '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> <!-- <b>bold</b> &lt; '
    "\u2028 \x00 \x1b[31m ${1} `x` \\u003c"
)
SEQUENCES = [
    sequence_of([chat("Say two", "two"), chat("Say\nsix", "six six", weight=0.5)]),
    sequence_of([chat(HOSTILE, HOSTILE)]),
    sequence_of([[("system", "Be kind.", 0.0), *chat("日本 🙂", "five"), ("tool", "{}", 0.0)]]),
]
PREVIEW = preview_of(SEQUENCES, packed=True, total_sequences=4321, seq_length=512, fill=np.array([0.2, 0.9, 1.0]))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "preview.html"
    path.write_text(html_page(PREVIEW), encoding="utf-8")
    return path


def switch(page, value: str) -> None:
    page.locator(f"label:has(input[value={value}])").click()


def background(locator) -> str:
    return locator.evaluate("node => getComputedStyle(node).backgroundColor")


def test_counts_are_the_sequences(browser, file):
    with opened(browser, file) as page:
        for number, sequence in enumerate(SEQUENCES):
            card = page.locator(f"#sequence-{number}")
            weights = sequence.loss_weights
            assert card.locator(".t").count() == len(sequence.ids)
            assert card.locator(".t.full").count() == sum(weight == 1 for weight in weights)
            assert card.locator(".t.part").count() == sum(0 < weight < 1 for weight in weights)
            assert card.locator(".tokens").count() == len(sequence.sources)
            head = card.locator(".head").inner_text()
            assert f"tokens\n{len(sequence.ids)}" in head
            assert f"supervised\n{sum(weight > 0 for weight in weights)} (" in head
            assert f"padding\n{512 - len(sequence.ids) + len(sequence.sources)}" in head
        assert "first 3 of 4,321 packed sequences of the train split" in page.locator(".lead").inner_text()
        assert page.locator("pre").inner_text() == "\n".join(PREVIEW.ledger)
        facts = page.locator(".facts").inner_text()
        assert "chatml" in facts and "messages" in facts and "/models/tiny" in facts and "70.00 %" in facts
        assert page.locator("figure").count() == 3
        assert "Tokens a sample: 4 counted" in page.locator("figure svg").first.get_attribute("aria-label")


def test_the_text_is_the_text(browser, file):
    with opened(browser, file) as page:
        shown = page.locator("#sequence-0 .tokens").nth(1).text_content()
        assert shown == "<|im_start|>user↵\nSay↵\nsix<|im_end|>↵\n<|im_start|>assistant↵\nsix six<|im_end|>↵\n"
        supervised = "".join(page.locator("#sequence-2 .t.full").all_text_contents())
        assert supervised == "five<|im_end|>" == SEQUENCES[2].supervised_text
        assert "日本 🙂" in page.locator("#sequence-2 .tokens").text_content()


def test_a_clicked_token_tells_everything(browser, file):
    sequence = SEQUENCES[0]
    index = next(i for i, weight in enumerate(sequence.loss_weights) if weight == 0.5)
    with opened(browser, file) as page:
        token = page.locator(f"#t0-{index}")
        token.click()
        terms = page.locator("#details dt").all_inner_texts()
        told = dict(zip(terms, page.locator("#details dd").all_inner_texts(), strict=True))
        assert told == {
            "id": str(sequence.ids[index]),
            "loss weight": "0.5",
            "role": "assistant",
            "turn": "1",
            "segment": "1",
            "position": str(sequence.position_ids[index]),
            "token": str(index),
        }
        assert page.locator("#details .big").inner_text() == sequence.pieces[index]
        assert token.get_attribute("aria-selected") == "true"
        page.locator("#t2-3").hover()
        assert page.locator("#details dd").first.inner_text() == str(SEQUENCES[2].ids[3])
        page.locator("h1").hover()  # away from the tokens the chosen one is told again
        assert page.locator("#details dd").first.inner_text() == str(sequence.ids[index])


def test_keyboard(browser, file):
    with opened(browser, file) as page:
        page.locator("#sequence-0 .tokens").first.focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
            page.keyboard.press(key)
        assert page.locator("[aria-selected=true]").get_attribute("id") == "t0-1"
        assert page.evaluate("document.activeElement.getAttribute('aria-activedescendant')") == "t0-1"
        page.keyboard.press("End")
        last = SEQUENCES[0].segments.count(0) - 1
        assert page.locator("[aria-selected=true]").get_attribute("id") == f"t0-{last}"
        page.keyboard.press("ArrowRight")  # the next document is a list of its own
        assert page.locator("[aria-selected=true]").get_attribute("id") == f"t0-{last}"


def test_colours(browser, file):
    with opened(browser, file) as page:
        user, answer = page.locator("#sequence-0 .t.user").nth(2), page.locator("#sequence-0 .t.full").first
        second = page.locator("#sequence-0 .tokens").nth(1).locator(".t.user").nth(2)
        plain = "rgba(0, 0, 0, 0)"
        assert background(user) == plain and background(answer) != plain
        assert page.locator(".legend:visible").inner_text().split("\n") == ["supervised", "weight below 1", "masked"]
        switch(page, "turn")
        assert background(user) != plain and background(user) == background(second) != background(answer)
        switch(page, "segment")
        assert background(user) == background(answer) != background(second)
        assert page.locator(".legend:visible").count() == 1


def test_table(browser, file):
    sequence = SEQUENCES[0]
    with opened(browser, file) as page:
        assert not page.locator("#sequence-0 table").is_visible()
        switch(page, "table")
        rows = page.locator("#sequence-0 tbody tr")
        assert rows.count() == len(sequence.ids) and not page.locator("#sequence-0 .tokens").first.is_visible()
        i = len(sequence.ids) - 2
        cells = rows.nth(i).locator("td").all_inner_texts()
        shown = sequence.pieces[i].replace(" ", "␣")
        numbers = (sequence.turns[i], sequence.segments[i], sequence.position_ids[i])
        assert cells == [str(i), str(sequence.ids[i]), shown, "0.5", "assistant", *map(str, numbers)]


def test_data_stays_data(browser, file):
    with opened(browser, file) as page:
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, b:has-text('bold')").count() == 0
        shown = page.locator("#sequence-1 .tokens").text_content()
        assert shown.count("</script><script>window.hacked = 1</script><img src=x") == 2
        assert "⟨U+2028⟩ ␀ ␛[31m ${1} `x` \\u003c" in shown


def test_names_from_outside_stay_text(browser, tmp_path):
    evil = '"><script>window.hacked = 1</script>'
    sequence = sequence_of([chat("a", "b")])
    sequence.sources = [f"/data/{evil}:1"]
    sequence.roles = [evil] * len(sequence.ids)
    preview = preview_of([sequence], tokenizer=evil, template=evil, format=evil, ledger=[evil])
    path = tmp_path / "evil.html"
    path.write_text(html_page(preview), encoding="utf-8")
    with opened(browser, path) as page:
        assert page.evaluate("window.hacked") is None
        assert evil in page.locator("#sequence-0 h4").inner_text() and evil in page.locator(".facts").inner_text()


def test_the_page_needs_nothing_else(file):
    text = file.read_text(encoding="utf-8")
    page = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    assert not re.search(r"""(src|href)=["']?[^#"']|@import|url\(|fetch\(|XMLHttpRequest|https?:""", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["sequences"][0]["ids"] == SEQUENCES[0].ids
    assert data["sequences"][0]["weights"] == SEQUENCES[0].loss_weights


@pytest.mark.parametrize("dark", [False, True])
def test_fits_a_phone(browser, file, dark):
    with opened(browser, file, width=360, height=740, dark=dark) as page:
        assert not page.locator("#details").is_visible()
        page.locator("#sequence-0 .t.full").first.click()
        assert page.locator("#details").is_visible()
        token, panel = page.locator("[aria-selected=true]").bounding_box(), page.locator("#details").bounding_box()
        assert token["y"] + token["height"] < panel["y"]
        for value in ("table", "text"):
            switch(page, value)
            assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.get_by_role("button", name="Close").click()
        assert not page.locator("#details").is_visible()


def test_light_and_dark(browser, file):
    def brightness(page) -> int:
        return sum(map(int, re.findall(r"\d+", background(page.locator("body")))[:3]))

    with opened(browser, file) as page:
        light = brightness(page)
        page.get_by_role("button", name="Light / dark").click()
        assert brightness(page) < 150 < 600 < light
    with opened(browser, file, dark=True) as page:
        assert brightness(page) < 150


def test_contrast(browser, file):
    """Text on every colour of tokens reaches 4.5 to 1, in both schemes (WCAG 2.2, 1.4.3)."""
    for dark in (False, True):
        with opened(browser, file, dark=dark) as page:
            for value in ("mask", "turn", "segment"):
                switch(page, value)
                ratio, where = worst_contrast(page, ".t, .head dt, .lead, figcaption span")
                assert ratio >= 4.5, (dark, value, where)


def test_a_very_long_sequence(browser, tmp_path):
    """A megabyte in one turn: the page holds a part and says so, and draws a part of that."""
    sequence = sequence_of([chat("x", "the answer is five, " * 52_000)])
    assert len(sequence.ids) > 2 * MOST_TOKENS and len(sequence.text) > 1_000_000
    path = tmp_path / "long.html"
    path.write_text(html_page(preview_of([sequence, sequence_of([chat("a", "b")])])), encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    with opened(browser, path) as page:
        card = page.locator("#sequence-0")
        said = f"The page holds the first {MOST_TOKENS:,} of {len(sequence.ids):,} tokens of this sequence"
        assert said in card.locator(".cut").inner_text()
        assert card.locator(".t").count() == 4096
        assert "4,096 of 20,000 tokens are shown" in card.locator(".more").inner_text()
        card.get_by_role("button", name="Show 4,096 more").click()
        assert card.locator(".t").count() == 8192
        switch(page, "table")
        assert card.locator("tbody tr").count() == 500
        card.get_by_role("button", name="Show 500 more").click()
        assert card.locator("tbody tr").count() == 1000
        assert page.locator("#sequence-1 .t").count() > 0


def test_many_sequences_are_drawn_when_asked_for(browser, tmp_path):
    sequences = [sequence_of([chat("x", "five " * 5000)]) for _ in range(8)]
    path = tmp_path / "many.html"
    path.write_text(html_page(preview_of(sequences)), encoding="utf-8")
    with opened(browser, path) as page:
        assert page.locator(".t").count() == 4 * 4096
        last = page.locator("#sequence-7")
        assert last.locator(".t").count() == 0
        last.get_by_role("button", name="Show 4,096 more").click()
        assert last.locator(".t").count() == 4096
