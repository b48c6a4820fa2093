"""JSON lists and JSONL.

Parsed here, not by the ``datasets`` library: its reader turns text that looks like a date into a timestamp, and names
neither file nor line of a malformed row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from primus_bridge.data.sources.row import Row
from primus_bridge.data.sources.text_file import BYTE_ORDER_MARK, decoded, opened, plain_suffix, raw_lines
from primus_bridge.errors import ConfigError

SUFFIXES = (".json", ".jsonl", ".ndjson")
BLANKS = b" \t\r\n"


class JSONFile:
    """A JSON list of objects, or JSONL, by the first character. Blank lines are skipped; CRLF and a byte-order mark
    are fine. Of JSONL one line is held at a time, and skipped lines are not parsed; the text of a list is held whole.
    """

    def __init__(self, path: Path):
        self.path = path
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            if self._is_list():
                self._length = sum(1 for _ in _parse_list(self.path))
            else:
                self._length = sum(1 for _, raw in raw_lines(self.path) if raw.strip(BLANKS))
        return self._length

    def rows(self, start: int) -> Generator[Row, None, int]:
        number = 0
        if self._is_list():
            for value, line in _parse_list(self.path):
                number += 1
                if number > start:
                    yield self._row(value, number, line)
        else:
            for line, raw in raw_lines(self.path):
                if not raw.strip(BLANKS):
                    continue
                number += 1
                if number > start:
                    yield self._row(self._parse_line(raw, line), number, line)
        return max(0, start - number)

    def _is_list(self) -> bool:
        return plain_suffix(self.path) == ".json" and _first_character(self.path) == b"["

    def _row(self, value: Any, number: int, line: int) -> Row:
        where = f"{self.path}:{line}"
        if not isinstance(value, dict):
            raise ConfigError(f"row {number} must be an object with named columns, found {_kind(value)}", where=where)
        return Row(value, number, where)

    def _parse_line(self, raw: bytes, line: int) -> Any:
        try:
            return json.loads(decoded(raw, self.path, line))
        except (json.JSONDecodeError, RecursionError) as error:
            hint = "one object a line (JSONL)"
            if plain_suffix(self.path) == ".json":
                hint = "a list of objects, or one object a line"
            reason = getattr(error, "msg", "nested too deeply")
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ConfigError(
                f"malformed JSON: {reason}{column}; expected {hint}", where=f"{self.path}:{line}"
            ) from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _first_character(path: Path) -> bytes:
    return next((stripped[:1] for _, raw in raw_lines(path) if (stripped := raw.strip(BLANKS))), b"")


def _parse_list(path: Path) -> Iterator[tuple[Any, int]]:
    """(value, line where it starts) of every element of a JSON list."""
    with opened(path) as file:
        text = decoded(file.read().removeprefix(BYTE_ORDER_MARK), path, 1)
    decoder, ink = json.JSONDecoder(), re.compile(r"[^ \t\r\n]")

    def after_blanks(at: int) -> int:
        found = ink.search(text, at)
        return found.start() if found else len(text)

    position = after_blanks(0) + 1  # past the '['
    line, counted = 1, 0

    def malformed(reason: str, at: int) -> ConfigError:
        return ConfigError(
            f"malformed JSON: {reason}; expected a list of objects", where=f"{path}:{text.count(chr(10), 0, at) + 1}"
        )

    position = after_blanks(position)
    while text[position : position + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise malformed(error.msg, error.pos) from None
        except RecursionError:
            raise malformed("nested too deeply", position) from None
        line += text.count("\n", counted, position)
        counted = position
        yield value, line
        position = after_blanks(end)
        if text[position : position + 1] == ",":
            position = after_blanks(position + 1)
        elif text[position : position + 1] != "]":
            raise malformed("Expecting ',' or ']' after a row", min(position, len(text)))
    rest = after_blanks(position + 1)
    if rest != len(text):
        raise malformed("text after the list", rest)
