"""A file that is written once, from its beginning to its end, and knows its SHA-256 as soon as it is on the disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from pathlib import Path
from typing import Any, Optional

LARGE = 8 * 2**20
"""Bytes from which on a thread of its own hashes the file, beside the writing."""

_BLOCK = 2**20
_WRITEBACK = 64 * 2**20
_SYNC_FILE_RANGE_WRITE = 2


class HashingFile:
    """A binary file for ``torch.save`` and the like: write, tell, flush; then ``close``."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("wb")
        self.digest = hashlib.sha256()
        self._written = 0
        """Bytes that a reader of the file finds."""
        self._hashed = 0
        self._ended = False
        self._grown = threading.Condition()
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None

    def write(self, data: Any) -> int:
        count = self.file.write(data)
        if self._thread is None and self.file.tell() > LARGE:
            self._thread = threading.Thread(target=self._follow, name="checksum", daemon=True)
            self._thread.start()
        if self._thread is not None and count > _BLOCK:
            self.flush()
        return count

    def tell(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()
        with self._grown:
            self._written = self.file.tell()
            self._grown.notify()

    def close(self) -> str:
        """Bring it to the disk; its checksum in hexadecimal digits."""
        with self.file:
            try:
                self.flush()
            finally:
                with self._grown:
                    self._ended = True
                    self._grown.notify()
            os.fsync(self.file.fileno())
        if self._thread is None:
            self._follow()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self.digest.hexdigest()

    def _follow(self) -> None:
        """Hash what has been written, up to the end. Read from the page cache: the writer's memory is not kept."""
        block, told = bytearray(_BLOCK), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                while True:
                    with self._grown:
                        self._grown.wait_for(lambda: self._ended or self._written > self._hashed)
                        end = self._written
                    if end == self._hashed:
                        return
                    while self._hashed < end:
                        count = file.readinto(memoryview(block)[: end - self._hashed])
                        if not count:
                            raise OSError(f"{self.path} has become shorter while it was written")
                        self.digest.update(memoryview(block)[:count])
                        self._hashed += count
                    if end - told >= _WRITEBACK:
                        _start_writeback(file.fileno(), told, end - told)
                        told = end
        except BaseException as error:
            self._error = error


def write_hashed(path: Path, data: Any) -> str:
    """Bring a whole file to the disk; its checksum."""
    file = HashingFile(path)
    file.write(data)
    return file.close()


def _start_writeback(descriptor: int, start: int, count: int) -> None:
    """Let the disk begin with it, so that less is left for the end. Source: sync_file_range(2)."""
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None), "sync_file_range", None)  # not in every C library
        if call is not None:
            call(descriptor, ctypes.c_int64(start), ctypes.c_int64(count), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
