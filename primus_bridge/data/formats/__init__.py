"""Formats: rows of alpaca, dolly, oasst, sharegpt, messages and other data become one internal list of messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from primus_bridge.data.formats.base import Format
from primus_bridge.data.formats.custom import custom_format
from primus_bridge.data.formats.instruction import alpaca, document, dolly, prompt_completion, squad
from primus_bridge.data.formats.names import ALIASES, COLUMNS, FORMATS, checked_columns, format_name
from primus_bridge.data.formats.oasst import OASST, Choice
from primus_bridge.data.formats.preference import Preference, pairs, preference
from primus_bridge.data.formats.recognise import recognise
from primus_bridge.data.formats.turns import messages, sharegpt

__all__ = ["ALIASES", "FORMATS", "Format", "Preference", "document", "format_name", "open_format", "pairs", "recognise"]

BY_ROW: dict[str, Callable[[dict[str, Any]], Any]] = {
    "alpaca": alpaca,
    "dolly": dolly,
    "sharegpt": sharegpt,
    "messages": messages,
    "prompt_completion": prompt_completion,
    "squad": squad,
    "preference": preference,
    "text": document,
}


class FormatOptions(Protocol):
    """The fields of DatasetArguments that a format reads."""

    columns: dict[str, Any]
    custom_format: dict[str, Any]
    format_function: str | None
    oasst_paths: Any
    languages: list[str]
    include_unreviewed: bool


def open_format(name: str, options: FormatOptions) -> Format:
    """The format of that name (not auto) with its options. Raises ConfigError naming the option that is wrong."""
    name = format_name(name)
    if name == "custom":
        return custom_format(options.custom_format, options.format_function, checked_columns(options.columns, None))
    columns = checked_columns(options.columns, [*COLUMNS[name].needed, *COLUMNS[name].optional])
    if name == "oasst":
        return OASST(Choice(options.oasst_paths, tuple(options.languages), options.include_unreviewed), columns)
    return Format(name, BY_ROW[name], columns)
