"""A launcher passes SIGTERM and SIGUSR1 on to its local ranks, which save and end; a second request ends them at once.

torch's own launcher would give them seconds before SIGKILL, and end with an error though every rank has saved.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, Optional

from primus_bridge.files import write_text
from primus_bridge.launch.signals import on_request

REQUEST_FILE = "signal"
"""The number of the signal that the launcher got, for a rank that starts after it."""


@contextmanager
def passing_on(folder: Path, end: type[BaseException]) -> Iterator[None]:
    """Inside, the first signal goes to every rank that joined through ``folder``; the second raises ``end``.

    end: torch's SignalException, on which its launcher ends the ranks.
    """

    def first(number: int) -> None:
        write_text(folder / REQUEST_FILE, str(number))  # before the look for ranks: join_signals looks the other way
        for path in folder.glob("pid_rank*"):
            with suppress(ProcessLookupError):
                os.kill(int(path.read_text(encoding="utf-8")), number)

    def second(number: int) -> None:
        raise end(f"{signal.Signals(number).name} received again", signal.Signals(number))

    with on_request(first, second):
        yield


def passed_on(folder: Path) -> Optional[int]:
    """The signal that was passed on, if any."""
    path = folder / REQUEST_FILE
    return int(path.read_text(encoding="utf-8")) if path.is_file() else None


def pid_of(folder: Path, rank: str | int) -> int:
    """The process of a rank that joined through ``folder``. Raises FileNotFoundError for another machine's."""
    return int(_pid_file(folder, rank).read_text(encoding="utf-8"))


def _pid_file(folder: Path, rank: str | int) -> Path:
    return folder / f"pid_rank{rank}"


def join_signals(folder: Path) -> None:
    """A rank that starts: from now on it gets the launcher's signals, and the one that came before it."""
    write_text(_pid_file(folder, os.environ.get("RANK", "0")), str(os.getpid()))
    if (number := passed_on(folder)) is not None:
        os.kill(os.getpid(), number)
