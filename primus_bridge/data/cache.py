"""The cache of tokenised data: a folder per content key, built once under a file lock, published by one rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from primus_bridge.errors import ConfigError


def cache_root() -> Path:
    """PRIMUS_BRIDGE_CACHE, else ~/.cache/primus_bridge, else (not writable) a folder of this user's in the temp dir."""
    asked = os.environ.get("PRIMUS_BRIDGE_CACHE")
    home = os.path.expanduser(asked or "~/.cache/primus_bridge")
    # "~" stays where a container's user has no home
    candidates = [] if home.startswith("~") else [Path(home)]
    candidates.append(Path(tempfile.gettempdir()) / f"primus_bridge-{os.getuid()}")
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # a folder that another user laid in the shared temp dir is not ours to trust
            if os.access(folder, os.W_OK | os.X_OK) and (asked or folder.stat().st_uid == os.getuid()):
                return folder
    raise ConfigError(
        "no writable cache folder (tried " + ", ".join(map(str, candidates)) + "); set PRIMUS_BRIDGE_CACHE to one"
    )


def content_hash(path: Path) -> str:
    """sha256 of a file. Remembered under its inode, size and change time, so that each rank need not read it again."""
    stat = path.stat()
    identity = f"{path.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    memo = cache_root() / "hashes" / hashlib.sha256(identity.encode()).hexdigest()
    with contextlib.suppress(OSError):
        remembered = memo.read_text()
        if len(remembered) == 64:
            return remembered
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    # a file changed within the clock's resolution of now could change again under the same times: not remembered
    if time.time_ns() - stat.st_ctime_ns > 2_000_000_000:
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(memo, digest.hexdigest())
    return digest.hexdigest()


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """The published folder of ``key``; ``build(folder)`` fills a temporary one when there is none yet.

    Any number of processes may ask at once: one builds, the others wait on the lock, then find it. When the builder
    fails with a ConfigError, those that waited raise the same one instead of each trying again. A folder without
    meta.json (which ``build`` writes last) was never committed.
    """
    root = cache_root()
    folder, failure = root / "tokenized" / key, root / "locks" / f"{key}.failed"
    if (folder / "meta.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        failure.parent.mkdir(parents=True, exist_ok=True)
        asked_at = time.time_ns()
        lock = FileLock(str(root / "locks" / f"{key}.lock"))
        _let_the_first_begin(lock, lambda: (folder / "meta.json").is_file() or _failed(failure, asked_at) is not None)
        with lock:
            if (folder / "meta.json").is_file():
                return folder
            if (told := _failed(failure, asked_at)) is not None:
                raise ConfigError(told)
            for left in folder.parent.glob(f"{key}.*"):  # by a builder that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder.parent))
            try:
                build(temporary)
                if folder.exists():  # left without its meta.json
                    shutil.rmtree(folder)
                os.replace(temporary, folder)
            except ConfigError as error:
                _write_atomically(failure, json.dumps({"time_ns": time.time_ns(), "message": str(error)}))
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            failure.unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        reason = getattr(error, "strerror", None) or error
        name = getattr(error, "filename", None)
        if isinstance(name, str) and not Path(name).is_relative_to(root):
            raise ConfigError(f"cannot be read: {reason}", where=name) from error
        raise ConfigError(
            f"cannot write the cache of tokenised data: {reason}; free some space or set PRIMUS_BRIDGE_CACHE to "
            "another folder",
            where=str(root),
        ) from error
    return folder


def drop_folder(key: str) -> None:
    """Remove a published folder; who has its files open keeps them."""
    shutil.rmtree(cache_root() / "tokenized" / key, ignore_errors=True)


def _failed(failure: Path, since: int) -> str | None:
    """The message of a builder that failed after ``since`` (ns)."""
    if not failure.is_file():
        return None
    told = json.loads(failure.read_text())
    return told["message"] if told["time_ns"] > since else None


def _let_the_first_begin(lock: FileLock, finished: Callable[[], bool], seconds: float = 20.0) -> None:
    """On a node's later ranks: wait until its first rank works, or has; not for ever, it may be on another file system.

    Whoever holds the lock builds, so the result is the same; but worker processes belong to the first rank.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return
    until = time.monotonic() + seconds
    while time.monotonic() < until and not finished():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        lock.release()
        time.sleep(0.1)


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)
