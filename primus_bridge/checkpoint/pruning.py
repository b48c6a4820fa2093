"""What goes from a save folder: outdated, half-written and damaged checkpoints, and its tracker's name of them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Optional

from primus_bridge.checkpoint.manifest import (
    ASIDE,
    ITERATION,
    MANIFEST,
    TRACKER,
    best,
    committed,
    iteration_folder,
    open_checkpoint,
    step_of,
)
from primus_bridge.checkpoint.sharing import STATE
from primus_bridge.errors import ConfigError
from primus_bridge.files import write_text

_REMOVED = ".removed"


def _is_whole(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except ConfigError:
        return False
    return True


def outdated(
    save: Path,
    keep: int,
    keep_every: Optional[int] = None,
    is_whole: Callable[[Path], bool] = _is_whole,
    up_to: Optional[int] = None,
) -> list[Path]:
    """The committed checkpoints that prune removes, oldest first.

    Not the newest ``keep`` of those that are whole, nothing that is newer than one of them, none of a multiple of
    ``keep_every`` steps, and not the best. is_whole: asked of the newest ones until enough are found; by default a
    manifest as it was written and all its files there, in their sizes. up_to: a step; what is newer is left alone.
    """
    whole, older, the_best = 0, list[Path](), best(save)
    for folder in reversed(committed(save)):
        if up_to is not None and step_of(folder) > up_to:
            continue
        if whole < keep:
            whole += is_whole(folder)
        elif folder != the_best and not (keep_every and step_of(folder) % keep_every == 0):
            older.append(folder)
    return older[::-1]


def prune(save: Path, keep: int, keep_every: Optional[int] = None, up_to: Optional[int] = None) -> list[Path]:
    """Remove the outdated checkpoints; those that went.

    up_to: the step just committed, whose checkpoint stays, whatever lies there under a newer name.
    """
    return remove(outdated(save, keep, keep_every, up_to=up_to))


def remove(folders: Iterable[Path]) -> list[Path]:
    """Remove checkpoints, each all at once as a reader sees it; those that went.

    One that cannot be removed is said on stderr: the newer ones stand, whatever became of an old one.
    """
    gone = [folder for folder in folders if _removed(folder)]
    for save in {folder.parent for folder in gone}:
        _follow_in_tracker(save)
    return gone


def uncommitted(save: Path) -> list[Path]:
    """Folders that a killed run left half-written or half-removed, oldest first.

    Only what begins as our own checkpoints do: Megatron-LM's have the same names and no manifest.
    """
    found = [path for path in save.glob("iter_*") if ITERATION.match(path.name) and not (path / MANIFEST).is_file()]
    halves = [path for path in found if (path / STATE).is_dir() or not any(path.iterdir())]
    return sorted(halves, key=step_of) + sorted(
        path for prefix in ("", ASIDE) for path in save.glob(f".{prefix}iter_*{_REMOVED}")
    )


def aside(save: Path) -> list[Path]:
    """Checkpoints that runs found damaged and set aside, oldest first."""
    return sorted((path for path in save.glob(f"{ASIDE}iter_*") if path.is_dir()), key=lambda path: path.name)


def set_aside(save: Path, damaged: Iterable[Path]) -> None:
    """Rename the damaged checkpoints of ``save`` to damaged_iter_*: none is kept in place of a whole one."""
    for folder in damaged:
        if folder.parent == save:
            renamed = folder.with_name(f"{ASIDE}{folder.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            folder.rename(renamed)
    _follow_in_tracker(save)


def _follow_in_tracker(save: Path) -> None:
    """Where the checkpoint that the tracker names is not there any more, have it name the newest that is."""
    try:
        named = iteration_folder(save, int((save / TRACKER).read_text()))
    except (OSError, ValueError):  # none, or "release", which Megatron-LM writes for weights alone
        return
    left = committed(save)
    # Megatron-LM's own checkpoints have no manifest, and their tracker stays
    if left and not named.is_dir():
        write_text(save / TRACKER, str(step_of(left[-1])))


def clean_uncommitted(save: Path) -> list[Path]:
    """Remove what ``uncommitted`` names, before a run saves anything here; what went."""
    return remove(uncommitted(save))


def _removed(folder: Path) -> bool:
    """Remove a checkpoint's folder. It first loses its name: killed here, nothing half-removed counts as whole."""
    doomed = folder if folder.name.endswith(_REMOVED) else folder.with_name(f".{folder.name}{_REMOVED}")
    try:
        if doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(folder, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        print(f"an old checkpoint could not be removed: {error}", file=sys.stderr, flush=True)
        return False
    return True
