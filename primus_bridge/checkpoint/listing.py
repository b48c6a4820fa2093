"""What lies in a save folder, checkpoint by checkpoint: what each holds, how large it is, whether it counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, Optional

from primus_bridge.checkpoint.manifest import (
    ASIDE,
    MANIFEST,
    Checkpoint,
    Manifest,
    best,
    read_manifest,
    wrong_size,
)
from primus_bridge.checkpoint.pruning import aside, uncommitted
from primus_bridge.errors import ConfigError

State = Literal["whole", "damaged", "half-written", "set aside", "foreign"]
"""whole: by the sizes of its files. half-written: by a run that was killed, or that writes it now. set aside: a run
found it damaged. foreign: without a manifest, such as Megatron-LM's own."""


@dataclass(frozen=True)
class Entry:
    """A checkpoint's folder. saved: when it was committed. findings: why it is damaged."""

    folder: Path
    state: State
    nbytes: int
    saved: Optional[datetime] = None
    manifest: Optional[Manifest] = None
    best: bool = False
    findings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the manifest in full."""
        return {
            "folder": str(self.folder),
            "state": self.state,
            "bytes": self.nbytes,
            "saved": self.saved.isoformat(timespec="seconds") if self.saved else None,
            "best": self.best,
            "findings": self.findings,
            "manifest": asdict(self.manifest) if self.manifest else None,
        }


def entries(save: Path) -> list[Entry]:
    """Every checkpoint of a save folder, the newest last."""
    halves, the_best = uncommitted(save), best(save)
    folders = [*(path for path in save.glob("iter_*") if path.is_dir()), *aside(save)]
    # by the step in the name, however many digits it has
    folders.sort(key=lambda path: (path.name.startswith("iter_"), len(path.name), path.name))
    return [_entry(folder, folder in halves, folder == the_best) for folder in folders]


def entry(folder: Path) -> Entry:
    """One checkpoint, an iteration folder."""
    return _entry(folder, folder in uncommitted(folder.parent), folder == best(folder.parent))


def _entry(folder: Path, half_written: bool, is_best: bool) -> Entry:
    nbytes = folder_bytes(folder)
    if not (folder / MANIFEST).is_file():
        return Entry(folder, "half-written" if half_written else "foreign", nbytes)
    is_aside = folder.name.startswith(ASIDE)
    saved = datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime, timezone.utc)
    try:
        checkpoint = Checkpoint(folder, read_manifest(folder))
    except ConfigError as error:
        return Entry(folder, "set aside" if is_aside else "damaged", nbytes, saved, findings=[error.message])
    wrong = [wrong_size(checkpoint, name) for name in checkpoint.manifest.files]
    findings = [finding for finding in wrong if finding is not None]
    state: State = "set aside" if is_aside else "damaged" if findings else "whole"
    return Entry(folder, state, nbytes, saved, checkpoint.manifest, is_best, findings)


def folder_bytes(folder: Path) -> int:
    """Of all files in it; a run may remove some meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
