"""Nothing that is shown controls the terminal or hides."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from primus_bridge.page.visible import one_line, visible


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain text, 日本 🙂 é", "plain text, 日本 🙂 é"),
        ("a\nb", "a↵\nb"),
        ("a\r\nb", "a␍↵\nb"),
        ("a\tb", "a⇥\tb"),
        ("\x1b[31mred\x07\x00", "␛[31mred␇␀"),
        ("\x7f", "␡"),
        ("\x9b31m", "⟨U+009B⟩31m"),
        ("\u202eabc\u2066", "⟨U+202E⟩abc⟨U+2066⟩"),
        ("zero\u200bwidth\ufeff", "zero⟨U+200B⟩width⟨U+FEFF⟩"),
        ("👩\u200d👧", "👩\u200d👧"),
        ("\u2028\ud800", "⟨U+2028⟩⟨U+D800⟩"),
        ("no\u00a0break\u3000wide", "no\u00a0break\u3000wide"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_no_control_is_left_of_all_characters():
    left = set(visible("".join(map(chr, range(sys.maxunicode + 1)))))
    hidden = {c for c in left if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert hidden == {"\n", "\t", "\u200c", "\u200d"}


def test_one_line():
    assert one_line("a\r\n\tb") == "a␍↵⇥b"
