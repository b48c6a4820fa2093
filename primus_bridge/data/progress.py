"""A bar over long preparation, on a terminal only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds of work before anything is shown."""


def shown(parts: Iterable[tuple[int, T]], what: str, total: Callable[[], int | None]) -> Iterator[T]:
    """The parts, each given with how many rows it is; a bar on stderr when that takes long.

    total: the number of rows, if known; asked only when the bar is shown, for it may cost a pass over the data.
    """
    if not sys.stderr.isatty():
        yield from (part for _, part in parts)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    progress = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    task = progress.add_task(what, total=None)
    begun = False
    try:
        for rows, part in parts:
            yield part
            progress.advance(task, rows)
            if not begun and time.monotonic() - started > PATIENCE:
                begun = True
                progress.update(task, total=total())
                progress.start()
    finally:
        progress.stop()
