"""Reading the fields of one row: text, answers, lists, mappings; what is wrong is named by its column."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from primus_bridge.data.messages import RowError, Unusable
from primus_bridge.errors import did_you_mean

# noncharacters (never legal in interchanged text) that templates and tokenize.py use as internal marks
RESERVED = r"\ufdd0-\ufdd3"
# half of a character, as a broken escape in JSON leaves it: no text that a tokenizer could read
SURROGATES = r"\ud800-\udfff"
UNUSABLE = re.compile(f"[{RESERVED}{SURROGATES}]")  # one class, without groups: several times faster


def column(data: Mapping[str, Any], name: str, why: str = "") -> Any:
    """The value of a column that must be there; ``why``, for the message: who asks for it."""
    if name not in data:
        found = ", ".join(map(str, data)) or "no columns"
        raise RowError(name, f"missing{did_you_mean(name, data)} ({why}the row has: {found})")
    return data[name]


def text(value: Any, place: str, *, optional: bool = False) -> str:
    """``value``, which must be text; optional: or null, read as empty."""
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise RowError(place, f"expected text, found {kind}; give every row text there")
    return _usable(value, place)


def answer(value: Any, place: str) -> str:
    """``value``, which must be text. Raises Unusable when it is empty: nothing could be learned from it."""
    if not text(value, place).strip():
        raise Unusable("no_answer")
    return value


def rows_of(value: Any, place: str, what: str = "turns") -> list:
    if not isinstance(value, list):
        raise RowError(place, f"expected a list of {what}, found {type(value).__name__}")
    return value


def from_json(value: str, place: str) -> Any:
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(place, f"malformed JSON: {getattr(error, 'msg', 'nested too deeply')}") from None


def json_value(value: Any, place: str) -> Any:
    """``value`` when it can be written as JSON without a reserved character."""
    try:
        _usable(json.dumps(value, ensure_ascii=False), place)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(place, f"cannot be written as JSON: {error}") from None
    return value


def _usable(value: str, place: str) -> str:
    if not value.isascii() and (unusable := UNUSABLE.search(value)):
        if re.match(f"[{RESERVED}]", unusable[0]):
            raise RowError(place, "holds a Unicode noncharacter (U+FDD0 to U+FDD3), which is reserved; remove it")
        raise RowError(place, "holds half of a surrogate pair (U+D800 to U+DFFF), which is no character; mend it")
    return value
