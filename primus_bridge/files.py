"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

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


def sync_folder(folder: Path) -> None:
    """The folder's entries are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have it done already, and refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path, progress: Callable[[int], Any] = lambda count: None, sync: bool = False) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    progress: told of the bytes of each block. sync: the file is on the disk when this returns.
    """
    digest, block = hashlib.sha256(), bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            progress(count)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


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


def write_error(error: Exception, what: str, where: Path) -> Optional[ConfigError]:
    """The ConfigError for a full disk, a read-only folder or a ConfigError; None for an error that is no write's."""
    if isinstance(error, ConfigError):
        return error
    free = shutil.disk_usage(existing_parent(where)).free
    reason = _disk_reason(error, free)
    if reason is None and isinstance(error, FileNotFoundError) and _is_in(error, where):
        reason = error.strerror  # such as a folder in /proc, which cannot be made
    if reason is None:
        return None
    advice = f"({free / 2**30:.2f} GiB free there); free space or give another folder"
    return ConfigError(f"cannot write {what}: {reason} {advice}", where=str(where))


def _is_in(error: FileNotFoundError, where: Path) -> bool:
    """Whether what is not there is the folder to write, or a part of it that is being prepared."""
    places = (str(where), str(partial_folder(where)))
    return str(error.filename).startswith(places) or str(error.filename2).startswith(places)


@contextmanager
def writing(what: str, where: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into a ConfigError that says what could not be written where."""
    try:
        yield
    except Exception as error:
        refusal = write_error(error, what, where)
        if refusal is None or refusal is error:
            raise
        raise refusal from error


# what a file system says; another number is a program that is missing, a peer that went away, or a bug
_WRITE_ERRORS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ESTALE EBUSY ENOTDIR EISDIR ENAMETOOLONG EMFILE".split()
}


def _disk_reason(error: Exception, free: int) -> Optional[str]:
    """Why a write failed; None for an error that is no write's."""
    text = str(error).strip()
    # safetensors, torch's writer and megatron.core's worker pass an error on as text
    numbered = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", text)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and numbered:
        number = int(numbered[1] or numbered[2])
    if number is not None:
        return os.strerror(number) if number in _WRITE_ERRORS else None
    if "inline_container" in text or "PytorchStreamWriter" in text:
        return os.strerror(errno.ENOSPC) if free < 2**20 else text.partition("\n")[0]
    return None


def looks_like_path(text: str) -> bool:
    """Whether ``text`` is meant as a place on disk: such a string is never tried as a hub id."""
    return text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1 or text.endswith("/")


def existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_writable(folder: Path, what: str) -> None:
    """Raises ConfigError when ``folder`` could not be made or written in; creates nothing."""
    try:
        parent = existing_parent(folder)
    except OSError as error:  # a name too long, a folder that may not be entered, links in a circle
        raise ConfigError(f"{what} cannot be: {error.strerror}", where=str(folder)) from None
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.is_symlink() and not place.exists():
            link = f"{place} is a link to {os.readlink(place)}, which is not there"
            raise ConfigError(f"{what} cannot be: {link}", where=str(folder))
    if not parent.is_dir():
        raise ConfigError(f"{what} cannot be a folder: {parent} is a file", where=str(folder))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{what} cannot be written: {parent} is read-only for this user", where=str(folder))


def check_output_file(file: Optional[str], option: str) -> None:
    """Raises ConfigError when the file that an option names could not be written; creates nothing."""
    if file is None:
        return
    path = Path(file)
    if path.is_dir():
        raise ConfigError(f"{option}: is a folder; give a file", where=file)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{option}: there is no folder {folder} to write it in", where=file)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{option}: its folder is read-only for this user", where=file)
