"""Files that a run keeps about itself: a disk that is full for a while neither ends the run nor costs it a line."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Callable, Optional

from primus_bridge.errors import ConfigError
from primus_bridge.files import writing


class PatientFile:
    """While the disk refuses the file this is said once, what it lacks stays in memory, and training goes on."""

    def __init__(self, path: Path):
        self.path = path
        self._due: Optional[Callable[[], Any]] = None
        self._refused = False

    def write(self, how: Callable[[], Any], must: bool = False) -> None:
        """how: brings the file up to date, or leaves it as it was and raises; it takes the place of one that waits.

        must: raises ConfigError when the disk refuses.
        """
        self._due = how
        self.retry(must)

    def retry(self, must: bool = False) -> None:
        """Write what waits, if anything does. must: raises ConfigError when the disk refuses still."""
        if self._due is None:
            return
        try:
            with writing("the run's files", self.path.parent):
                self._due()
        except ConfigError as error:
            if must:
                raise
            if not self._refused:
                self._refused = True
                _say(
                    f"WARNING   {error}",
                    f"          training goes on; what {self.path.name} lacks waits in memory, is written as soon as "
                    "there is room, and must be when the run ends",
                )
            return
        self._due = None
        if self._refused:
            self._refused = False
            _say(f"note: {self.path} is written again, nothing is missing from it")


class AppendedFile(PatientFile):
    """A file that grows by whole pieces; one that did not fit leaves no part of it."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.waiting: list[bytes] = []
        """The pieces that are not in the file, oldest first."""
        self._length = path.stat().st_size if path.exists() else 0
        """Of what this run holds to be in it; what is behind that goes."""

    def add(self, piece: bytes, must: bool = False) -> None:
        """must: raises ConfigError when the disk refuses."""
        self.waiting.append(piece)
        self.write(self._append, must)

    def rewind(self, length: int, waiting: list[bytes], must: bool = False) -> None:
        """Keep the first ``length`` bytes of the file, in place, which takes no room; ``waiting`` follows them.

        must: raises ConfigError when the disk refuses.
        """
        self._length, self.waiting = min(length, self._length), waiting
        self.write(self._append, must)

    def _append(self) -> None:
        # opened each time: some network file systems refuse only when a file is closed
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end > self._length:
                end = file.truncate(self._length)
            try:
                _write_all(file, b"".join(self.waiting))
            except OSError:
                file.truncate(end)
                raise
            length = file.seek(0, os.SEEK_END)
        self._length = length
        self.waiting.clear()


def _write_all(file: BinaryIO, data: bytes) -> None:
    """An unbuffered file takes a part when there is no room for all."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _say(*lines: str) -> None:
    with suppress(OSError):  # the log may lie on the same disk
        print(*lines, sep="\n", flush=True)
