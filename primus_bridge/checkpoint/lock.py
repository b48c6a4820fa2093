"""RunLock: one run a save folder. The lock goes with the last process of the run, however that process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ContextManager, Optional

from primus_bridge.errors import ConfigError
from primus_bridge.files import check_writable, writing
from primus_bridge.together import refusing_together

LOCK_FILE = ".lock"

WAIT_SECONDS = 30.0
"""How long the processes of a run that has been killed may need to go."""

RELEASE_SECONDS = 2.0
"""How long rank 0 waits for the others' release, to remove the file after them."""

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class _NoLocks(OSError):
    """The file system has none."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: the process of rank 0, its Slurm job and how often that was requeued, and since when."""

    pid: int
    host: str
    job: Optional[str]
    restart: Optional[str]
    since: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        job, restart = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT"))
        return cls(os.getpid(), socket.gethostname(), job, restart, time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def read(cls, descriptor: int) -> Optional[Holder]:
        """What ``write`` has left; None when there is nothing yet."""
        try:
            return cls(**json.loads(os.pread(descriptor, 4096, 0)))
        except (ValueError, TypeError):
            return None

    def write(self, descriptor: int) -> None:
        """In place: a new file would have no lock."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(self)).encode(), 0)

    def has_ended(self) -> bool:
        """Whether rank 0 is known to be gone, so that other ranks must be on their way out."""
        here = Holder.here()
        if self.host == here.host:
            return not _runs(self.pid)
        return self.job is not None and self.job == here.job and self.restart != here.restart

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"pid {self.pid} on {self.host}{job}, since {self.since}"


def _runs(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


class RunLock:
    """The lock of a save folder: ``acquire`` on all ranks, ``release`` on each; or ``with RunLock.acquire(save):``.

    SAVE/.lock has an advisory lock of the kernel (flock) of each rank's process, so none needs to be removed by hand.
    A forked child shares its parent's: a worker that still writes holds it. Source: flock(2).
    """

    def __init__(self, save: Path):
        self._save, self._path = save, save / LOCK_FILE
        self._descriptor: Optional[int] = None
        self._created = False
        """Whether the file was not there before."""
        self._lockless = False
        """Whether the file system has no locks, and another run's file lies there."""
        self._leads = False
        self._made: list[Path] = []
        """Folders that were not there before, the innermost first."""

    @classmethod
    def acquire(cls, save: Path) -> RunLock:
        """Lock ``save``, which is made when it is missing. Collective; without a process group rank 0's alone.

        Raises ConfigError, the same on every rank, when another run uses the folder or it cannot be written. Where the
        file system has no locks, rank 0 says so, and nothing is locked; the file of a run on a machine where it has
        them is heeded.
        """
        import torch.distributed as dist

        grouped = dist.is_initialized()
        lead = (dist.get_rank() if grouped else int(os.environ.get("RANK", "0"))) == 0
        lock = cls(save)

        def agreeing() -> ContextManager[Any]:
            return refusing_together() if grouped else nullcontext()

        try:
            with agreeing():
                if lead:
                    lock._lead()
            with agreeing():
                if grouped and not lead:
                    lock._follow()
        except BaseException:
            lock.release()
            raise
        return lock

    def release(self) -> None:
        """Give the folder free; rank 0, the last, leaves no lock file, nor an empty folder that it has made."""
        leads, self._leads = self._leads, False
        with suppress(OSError):
            if leads and self._is_alone():
                if self._descriptor is not None:
                    self._path.unlink(missing_ok=True)
                for folder in self._made:
                    folder.rmdir()
        if self._descriptor is not None:
            # closing is not enough where a forked child still has the descriptor
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _lead(self) -> None:
        """Rank 0's part: be the only one for a moment, say who it is, and let the other ranks in."""
        check_writable(self._save, "the save folder")
        began, told = time.monotonic(), False
        while not self._take_alone():
            # by a run that has just ended, whose name is still in the file that was opened
            removed = not self._is_the_file()
            holder = None if removed else self._read_holder()
            ended = holder is not None and holder.has_ended()
            # one that is not named yet has only just got it
            patience = WAIT_SECONDS if ended or removed else 1.0 if holder is None else 0.0
            if time.monotonic() - began >= patience:
                self._close()
                raise self._refusal(holder, ended)
            if ended and not told:
                told = True
                print(f"waiting   for the last processes of a run ({holder}) to leave {self._save}", flush=True)
            time.sleep(0.1)
        self._leads = True
        if self._descriptor is None:
            print(f"note: {self._save} is on a file system without locks: nothing keeps a second run out", flush=True)

    def _follow(self) -> None:
        """Another rank's part: the lock is held until its process, too, has gone. Nothing where rank 0 has none."""
        with self._using(), suppress(FileNotFoundError):
            self._open(os.O_RDWR)
            try:
                locked = self._lock(fcntl.LOCK_SH)
            except _NoLocks:
                return self._close()
            if not locked:
                holder = self._read_holder()
                self._close()
                raise self._refusal(holder, ended=False)

    def _take_alone(self) -> bool:
        """Whether it is got; without a descriptor where there are no locks, and nobody else's file is in the way."""
        with self._using():
            try:
                self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self._created = True
            except FileExistsError:
                self._open(os.O_RDWR | os.O_CREAT)
                self._created = False
            assert self._descriptor is not None
            try:
                if not (self._lock(fcntl.LOCK_EX) and self._is_the_file()):
                    return False
                Holder.here().write(self._descriptor)
                return self._lock(fcntl.LOCK_SH)
            except _NoLocks:
                return self._go_without()

    def _go_without(self) -> bool:
        holder = self._read_holder()
        if self._created and holder is None:
            self._path.unlink(missing_ok=True)
        elif holder is None or not holder.has_ended():
            self._lockless = True
            return False
        self._close()
        return True

    def _open(self, flags: int) -> None:
        self._close()
        missing = [folder for folder in (self._save, *self._save.parents) if not folder.exists()]
        self._made = missing or self._made
        self._save.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, flags, 0o666)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, kind: int) -> bool:
        """Whether it is got, without waiting. Raises _NoLocks."""
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            raise _NoLocks from error
        return True

    def _is_the_file(self) -> bool:
        """Whether the open file still lies there: a run that ended meanwhile has removed it."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _is_alone(self) -> bool:
        """Whether the other ranks have released it too, which they do about now."""
        if self._descriptor is None:
            return True
        deadline = time.monotonic() + RELEASE_SECONDS
        while not self._lock(fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return self._is_the_file()

    def _read_holder(self) -> Optional[Holder]:
        assert self._descriptor is not None
        return Holder.read(self._descriptor)

    def _using(self) -> ContextManager[None]:
        return writing("the lock of the save folder", self._save)

    def _refusal(self, holder: Optional[Holder], ended: bool) -> ConfigError:
        who = f" ({holder})" if holder is not None else ""
        if self._lockless:
            return ConfigError(
                f"{LOCK_FILE} says that another run{who} is using this folder, and here the file system has no locks "
                f"that tell whether it still does: wait for its end; if it has ended, remove {self._path}; or give "
                "another --save",
                where=str(self._save),
            )
        if ended:
            return ConfigError(
                f"processes of a run{who} that was ended still use this folder: end them, or give another --save",
                where=str(self._save),
            )
        return ConfigError(
            f"another run is using this folder{who}: wait for its end, or give another --save", where=str(self._save)
        )
