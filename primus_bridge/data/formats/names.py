"""The formats' names and the columns of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from primus_bridge.errors import ConfigError, did_you_mean


class Columns(NamedTuple):
    needed: tuple[str, ...]
    """By these the format is recognised."""
    optional: tuple[str, ...] = ()


# of two that a row fits, the one that comes first is meant
COLUMNS = {
    "preference": Columns(
        ("chosen", "rejected"), ("prompt", "conversations", "messages", "instruction", "input", "system", "tools")
    ),
    "messages": Columns(("messages",), ("system", "tools")),
    "sharegpt": Columns(("conversations",), ("system", "tools")),
    "oasst": Columns(
        ("message_id", "parent_id", "text", "role"),
        ("prompt", "message_tree_id", "lang", "rank", "deleted", "review_result"),
    ),
    "squad": Columns(("question", "context", "answers"), ("system",)),
    "alpaca": Columns(("instruction", "output"), ("input", "system", "history")),
    "dolly": Columns(("instruction", "response"), ("context", "system")),
    "prompt_completion": Columns(("prompt", "completion"), ("response", "system", "tools")),
    "text": Columns(("text",)),
}

FORMATS = ("auto", *COLUMNS, "custom")
ALIASES = {
    "chat": "messages",
    "chatml": "messages",
    "openai": "messages",
    "oasst1": "oasst",
    "oasst2": "oasst",
    "dpo": "preference",
}


def format_name(asked: str) -> str:
    """One of FORMATS, of its name or another name for it. Raises ConfigError for an unknown one."""
    name = ALIASES.get(asked, asked)
    if name not in FORMATS:
        hint = did_you_mean(asked, (*FORMATS, *ALIASES)) or f"; known are {', '.join(FORMATS)}"
        raise ConfigError(f"unknown format '{asked}'{hint}", where="dataset.dataset_format")
    return name


def checked_columns(columns: dict[str, Any], known: Sequence[str] | None) -> dict[str, str]:
    """``dataset.columns``, of which every key must be one of ``known``; None: any. Raises ConfigError."""
    for ours, theirs in columns.items():
        if known is not None and ours not in known:
            hint = did_you_mean(ours, known) or f"; it has {', '.join(known)}"
            raise ConfigError(f"the format has no column '{ours}'{hint}", where="dataset.columns")
        if not isinstance(theirs, str):
            raise ConfigError(f"'{ours}' must name a column of the data, found {theirs!r}", where="dataset.columns")
    return dict(columns)
