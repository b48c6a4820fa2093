"""What one rank writes of a checkpoint: in this thread, or in another one while training goes on."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from primus_bridge.watchdog import wait_for_threads


@dataclass
class Written:
    """What a rank's writing came to: checksums of its files, Megatron's entries of the index, and what went wrong."""

    checksums: dict[str, str] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    error: Optional[BaseException] = None


Work = Callable[[Callable[[], bool]], Written]
"""Does the writing; asks its argument now and then, a tensor at a time, whether it should stop."""


class Writer:
    """Runs ``work`` once, in a thread of its own when ``background``; what it raises is kept in ``result().error``."""

    def __init__(self, work: Work, background: bool):
        self._work: Optional[Work] = work
        self._written = Written()
        self._stopped = False
        self._asked = 0
        """How often the work has asked whether it should stop."""
        self._thread: Optional[threading.Thread] = None
        if background:
            # a rank that dies does not wait for it: what it writes was never committed
            self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._written = self._work(self._should_stop)
        except BaseException as error:
            self._written = Written(error=error)
        self._work = None  # and the staged copies that it holds

    def _should_stop(self) -> bool:
        self._asked += 1
        return self._stopped

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def result(self) -> Written:
        """Waits for the end; a rank whose writer makes progress does not hang."""
        if self._thread is not None:
            wait_for_threads(self._has_ended, lambda: self._asked, "part written")
        return self._written

    def _has_ended(self, seconds: float) -> bool:
        assert self._thread is not None
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Leave the rest unwritten, and wait for the end."""
        self._stopped = True
        self.result()
