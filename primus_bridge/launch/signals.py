"""SIGTERM and SIGUSR1 as a request: the run saves after the step under way and ends; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from primus_bridge.files import write_text

ASKING = (signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what sbatch --signal sends ahead of a time limit, SIGTERM what preemption and scancel send."""

ONE_REQUEST_SECONDS = 2.0
"""Signals this close together are one request: a rank gets it from Slurm or its group, and again from its launcher."""

STOPPED_FILE = "stopped"
"""In the save folder of a run that a signal ended: which one, and at which step. A batch script requeues by it."""

Asked = Callable[[], Optional[str]]
"""Says why the run should save and end; None as long as nobody asked."""

_listening: Optional[Asked] = None


@contextmanager
def on_request(first: Callable[[int], None], second: Callable[[int], None]) -> Iterator[None]:
    """Inside, the first signal of ASKING calls ``first`` with its number, a later request ``second``.

    Elsewhere than in the main thread signals cannot be caught, and neither is ever called.
    """
    since: Optional[float] = None

    def received(number: int, _frame: Any) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            first(number)
        elif time.monotonic() - since > ONE_REQUEST_SECONDS:
            second(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ASKING}
    for number in ASKING:
        signal.signal(number, received)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def asked_to_end() -> Iterator[Asked]:
    """Inside, the given function says why the run should save and end. A second request does what it did outside.

    Inside another asked_to_end it is that one's function.
    """
    global _listening
    if _listening is not None:
        yield _listening
        return
    reason: Optional[str] = None
    before = {number: signal.getsignal(number) for number in ASKING}

    def first(number: int) -> None:
        nonlocal reason
        reason = f"{signal.Signals(number).name} received"
        if os.environ.get("RANK", "0") == "0":
            # no print: the signal may have come inside one
            os.write(2, f"primus: {reason}: ending after the work under way; again to end at once\n".encode())

    def second(number: int) -> None:
        signal.signal(number, before[signal.Signals(number)])
        signal.raise_signal(number)

    _listening = lambda: reason  # noqa: E731
    try:
        with on_request(first, second):
            yield _listening
    finally:
        _listening = None


def asked_on_any_rank(asked: Asked) -> Optional[str]:
    """The reason of the first rank that has one: a signal may reach one rank alone. Collective."""
    import torch.distributed as dist

    reasons: list[Optional[str]] = [asked()]
    if dist.get_world_size() > 1:
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, asked())
    return next(filter(None, reasons), None)


def write_stopped(save_folder: Path, where: str, reason: str) -> None:
    """Leave STOPPED_FILE: 'SIGUSR1 received at step 7 of 20'."""
    save_folder.mkdir(parents=True, exist_ok=True)
    write_text(save_folder / STOPPED_FILE, f"{reason} {where}\n")


def read_stopped(save_folder: Path) -> Optional[str]:
    """What STOPPED_FILE says; None for a run that no signal has ended."""
    path = save_folder / STOPPED_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def clear_stopped(save_folder: Path) -> None:
    """A run that goes on is not stopped."""
    (save_folder / STOPPED_FILE).unlink(missing_ok=True)
