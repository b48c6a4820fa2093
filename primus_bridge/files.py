"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from primus_bridge.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
def writing(what: str, where: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into a ConfigError that says what could not be written where."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(existing_parent(where)).free
        raise ConfigError(
            f"cannot write {what}: {error.strerror or error} ({free / 2**30:.2f} GiB free there); "
            "free space or give another folder",
            where=str(where),
        ) from error


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
