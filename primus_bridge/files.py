"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Iterator, Optional

from primus_bridge.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def partial_folder(target: Path) -> Path:
    """The hidden folder beside ``target`` in which it is prepared."""
    return target.with_name(f".{target.name}.partial")


def replace_folder(prepared: Path, target: Path) -> None:
    """Give ``prepared`` the name ``target``; an older ``target`` disappears only when the new one stands."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(prepared, target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(what: str, where: Path, remove: Optional[Path] = None) -> Iterator[None]:
    """Turn a full disk or a read-only folder into a ConfigError that says what could not be written where.

    remove: a folder that such a failure leaves half-written; it goes, and its space is free again.
    """
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(existing_parent(where)).free
        reason = _disk_reason(error, free)
        if reason is None:
            raise
        if remove is not None:
            shutil.rmtree(remove, ignore_errors=True)
        raise ConfigError(
            f"cannot write {what}: {reason} ({free / 2**30:.2f} GiB free there); free space or give another folder",
            where=str(where),
        ) from error


def _disk_reason(error: Exception, free: int) -> Optional[str]:
    """Why a write failed; None for an error that is no write's."""
    if isinstance(error, ConnectionError):  # a peer or a pipe went away
        return None
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    # safetensors, torch's writer and megatron.core's worker pass an error on as text
    numbered = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", text)
    if numbered:
        return os.strerror(int(numbered[1] or numbered[2]))
    if "inline_container" in text or "PytorchStreamWriter" in text:
        return os.strerror(errno.ENOSPC) if free < 2**20 else text.partition("\n")[0]
    return text.partition("\n")[0] if isinstance(error, OSError) else None


def existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_writable(folder: Path, what: str) -> None:
    """Raises ConfigError when ``folder`` could not be made or written in; creates nothing."""
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise ConfigError(f"{what} cannot be a folder: {parent} is a file", where=str(folder))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{what} cannot be written: {parent} is read-only for this user", where=str(folder))
