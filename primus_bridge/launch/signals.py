"""SIGTERM and SIGUSR1 as a request: the run saves after the step under way and ends; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional

ASKING = (signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what sbatch --signal sends ahead of a time limit, SIGTERM what preemption and scancel send."""


@contextmanager
def asked_to_end() -> Iterator[Callable[[], Optional[str]]]:
    """Inside, the given function says why the run should save and end, None as long as nobody asked.

    Elsewhere than in the main thread signals cannot be caught, and it is always None.
    """
    reason: Optional[str] = None

    def asked(number: int, _frame: Any) -> None:
        nonlocal reason
        reason = f"{signal.Signals(number).name} received"
        signal.signal(number, before[signal.Signals(number)])  # who asks again does not want to wait

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in ASKING}
    for number in ASKING:
        signal.signal(number, asked)
    try:
        yield lambda: reason
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
