"""One row of data and where it lies; and what reads rows from one file or data set."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple, Protocol


class Row(NamedTuple):
    """One row: its values, and where a user finds it."""

    data: dict[str, Any]
    number: int
    """Counted from 1, within its file (or hub split)."""
    where: str
    """``file:line``, ``file`` for Parquet and Arrow, or the hub id."""


class Reader(Protocol):
    def __len__(self) -> int: ...

    def rows(self, start: int) -> Generator[Row, None, int]:
        """The rows from index ``start`` on; returns how many of the ``start`` rows lay beyond the end."""
