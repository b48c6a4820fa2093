"""Text of unknown origin as text that can be shown: nothing in it controls a terminal, reorders a line, or hides."""

from __future__ import annotations

import unicodedata

NEWLINE_SIGN = "\u21b5"
TAB_SIGN = "\u21e5"
JOINERS = "\u200c\u200d"
"""Format controls that emoji and some scripts are written with; they stay."""


def visible(text: str) -> str:
    """``text`` with a sign for each character that is a control, a format control or no character at all.

    A newline is its sign and the newline itself; a tab its sign and the tab.
    """
    return text if text.isprintable() else "".join(map(_sign, text))


def one_line(text: str) -> str:
    """The same without line breaks and tabs: their signs alone."""
    return visible(text).replace("\n", "").replace("\t", "")


def _sign(character: str) -> str:
    if character == "\n":
        return NEWLINE_SIGN + "\n"
    if character == "\t":
        return TAB_SIGN + "\t"
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)  # Unicode's pictures of the controls
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") and character not in JOINERS:
        return f"\u27e8U+{code:04X}\u27e9"
    return character
