"""Which format the first rows have, by the names and kinds of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from primus_bridge.data.formats.base import renamed
from primus_bridge.data.formats.names import COLUMNS, checked_columns, format_name
from primus_bridge.data.messages import RowError
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from primus_bridge.data.sources import Row


def recognise(rows: Sequence[Row], asked: str, stage: str, columns: dict[str, Any] | None = None) -> tuple[str, str]:
    """(format, how it was chosen) from ``dataset_format`` and the first rows, as they are in the file.

    Raises ConfigError when 'auto' fits no known format, or the format does not fit the stage.
    """
    columns = checked_columns(columns or {}, None)
    known = ", ".join(f"{name} ({', '.join(COLUMNS[name].needed)})" for name in _of_stage(stage))
    if asked != "auto":
        name = format_name(asked)
        if (name == "text") != (stage == "pretrain"):
            raise ConfigError(f"dataset_format '{asked}' does not fit stage '{stage}', which takes {known}")
        return name, "asked for"
    seen = [_recognise_row(row, stage, columns) for row in rows]
    # a row that lacks a column is that row's fault: converting it names the column and the line
    chosen = next((name for name in seen if name), None)
    odd = next((row for row, name in zip(rows, seen, strict=True) if name not in (chosen, None)), None)
    shown = ", ".join(map(str, rows[0].data))
    if chosen is None or odd is not None:
        mend = "set dataset.dataset_format, or rename with dataset.columns"
        if stage == "pretrain" and _recognise_row(rows[0], "sft", columns):
            mend = "these look like instruction rows: set stage: sft"
        elif stage != "pretrain" and "text" in rows[0].data:
            mend = "these look like plain text: set stage: pretrain"
        if odd is not None:
            shown += f"; and then {', '.join(map(str, odd.data))}"
        raise ConfigError(
            f"dataset_format 'auto' does not recognise the first rows (columns: {shown}); "
            f"stage '{stage}' takes {known}; {mend}",
            where=(odd or rows[0]).where,
        )
    if columns:
        shown += "; " + ", ".join(f"{theirs} read as {ours}" for ours, theirs in columns.items())
    return chosen, f"recognised from columns {shown}"


def _of_stage(stage: str) -> list[str]:
    return [name for name in COLUMNS if (name == "text") == (stage == "pretrain")]


def _recognise_row(row: Row, stage: str, columns: dict[str, str]) -> str | None:
    try:
        data = renamed(row.data, columns)
    except RowError as error:
        raise error.at(row) from None
    if stage != "pretrain" and isinstance(data.get("prompt"), dict) and "replies" in data["prompt"]:
        return "oasst"
    found = next((name for name in _of_stage(stage) if _has(data, COLUMNS[name].needed)), None)
    if found is None and stage != "pretrain" and _has(data, ("prompt", "response")):
        return "prompt_completion"
    return _shape_of_turns(data[COLUMNS[found].needed[0]], found) if found in ("messages", "sharegpt") else found


def _has(data: dict[str, Any], names: Sequence[str]) -> bool:
    return all(name in data for name in names) and data[names[0]] is not None


def _shape_of_turns(turns: Any, found: str) -> str | None:
    """messages or sharegpt, by the keys of the first turn."""
    first = turns[0] if isinstance(turns, list) and turns else {}
    if isinstance(first, dict) and "from" in first and "value" in first:
        return "sharegpt"
    if found == "messages" or (isinstance(first, dict) and "role" in first and "content" in first):
        return "messages"  # whatever is wrong with the turns, converting the row says it
    return None
