"""What stands on the terminal, with colour and without."""

from __future__ import annotations

import re

import pytest

from primus_bridge.preview import terminal
from primus_bridge.preview.terminal import SHOWN_TOKENS, show
from tests.preview.sequences import chat, preview_of, sequence_of

ESCAPE = re.compile(r"\x1b\[([\d;]*)m")


@pytest.fixture
def printed(monkeypatch, capsys):
    """printed(preview, colour): what show prints."""

    def printed(preview, colour: bool = False) -> str:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("FORCE_COLOR" if colour else "NO_COLOR", "1")
        show(preview)
        return capsys.readouterr().out

    return printed


def test_brackets_without_colour(printed):
    out = printed(preview_of([sequence_of([chat("Say\ntwo", "two"), chat("Say six", "six")])]))
    lines = out.splitlines()
    assert lines[0] == "the first 1 of 1 sequence of the train split"
    assert "\x1b" not in out
    body = out[out.index("-- segment 0") :]
    assert re.match(r"-- segment 0: /data/chat\.jsonl:1, \d+ tokens, \d+ supervised\n", body)
    assert body.split("\n", 1)[1].startswith(
        "<|im_start|>user↵\nSay↵\ntwo<|im_end|>↵\n<|im_start|>assistant↵\n⟦two<|im_end|>⟧↵\n"
        "-- segment 1: /data/chat.jsonl:2"
    )
    assert "⟦six<|im_end|>⟧↵" in body
    assert out.endswith("\ndata      /data/chat.jsonl\nsamples   2\nsupervised  20\n")


def test_weights_without_colour(printed):
    out = printed(preview_of([sequence_of([chat("Say two", "two", weight=0.25)])]))
    assert "⟦0.25:two<|im_end|>⟧" in out


def test_colours_are_the_weights(printed):
    sequence = sequence_of([chat("Say two", "two"), chat("Say six", "six", weight=0.5)])
    out = printed(preview_of([sequence]), colour=True)
    assert "⟦" not in out
    shown = _styled(out)
    assert shown["two"] == "1;32" and shown["six"] == "32" and shown["Say two"] == "2"
    assert shown["<|im_start|>"] == "36" and "1;30;42" in out and "\x1b[30;42m<|im_end|>" in out
    # the same text, whatever marks it
    plain = printed(preview_of([sequence]))
    assert ESCAPE.sub("", out).split("-- segment", 1)[1] == re.sub(r"⟦(0\.5:)?|⟧", "", plain).split("-- segment", 1)[1]


def _styled(out: str) -> dict[str, str]:
    """Each text that stands between two escapes, and the style it has."""
    parts = ESCAPE.split(out)
    return {text: style for style, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_controls_and_markup_do_not_reach_the_terminal(printed):
    hostile = "\x1b]0;title\x07\x9b2J[bold red]x[/] :smile: \u202e\rback"
    for colour in (False, True):
        out = printed(preview_of([sequence_of([chat(hostile, "fine")])]), colour)
        assert not set(ESCAPE.sub("", out)) & set("\x1b\x07\x9b\u202e\r")
        assert "␛]0;title␇⟨U+009B⟩2J[bold red]x[/] :smile: ⟨U+202E⟩␍back" in ESCAPE.sub("", out)


def test_long_lines_are_not_wrapped(printed):
    out = printed(preview_of([sequence_of([chat("x", "the answer " * 100)])]))
    assert "⟦" + "the answer " * 100 + "<|im_end|>⟧" in out


def test_header_counts(printed):
    sequence = sequence_of([chat("Say two", "two"), chat("Say six", "six")])
    supervised = sum(weight > 0 for weight in sequence.loss_weights)
    out = printed(preview_of([sequence], seq_length=200, packed=True, total_sequences=4321))
    tokens = len(sequence.ids)
    assert "the first 1 of 4,321 packed sequences of the train split" in out
    assert f"sequence 0: {tokens} tokens, {supervised} supervised (" in out
    assert f"2 segments, {200 - (tokens - 2)} padding" in out


def test_streaming_says_so(printed):
    out = printed(preview_of([sequence_of([chat("a", "b")])], streaming=True, total_sequences=9))
    assert out.startswith("the first 1 of 9 sequences of the first window of the train split\n")


def test_a_very_long_sequence_is_cut_and_says_so(printed):
    sequence = sequence_of([chat("x", "five six " * SHOWN_TOKENS)])
    out = printed(preview_of([sequence]))
    assert f"... {len(sequence.ids) - SHOWN_TOKENS:,} more tokens; --json and --html have them" in out
    assert len(out) < 20 * SHOWN_TOKENS


def test_an_encoding_without_the_signs(monkeypatch):
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(terminal.sys, "stdout", stream)
    show(preview_of([sequence_of([chat("日本", "two")])]))
    stream.flush()
    assert rb"\u65e5\u672c" in stream.buffer.getvalue()
