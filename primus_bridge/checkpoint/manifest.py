"""Checkpoint folders and their manifests: SAVE/iter_0000100/manifest.json is written last and is the commit mark."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from primus_bridge import __version__
from primus_bridge.config.arguments import PeftArguments
from primus_bridge.errors import ConfigError
from primus_bridge.files import write_json, write_text

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best.json"
"""SAVE/best.json: checkpoint, step and eval_loss of the best evaluation, where a run keeps that checkpoint."""
HF_ASSETS = "hf_assets"
"""Folder inside a checkpoint: config.json, tokenizer, chat template and generation config of the model."""
_ITERATION = re.compile(r"^iter_(\d{7,})$")


@dataclass
class Manifest:
    """What a committed checkpoint holds."""

    step: int
    contents: str
    """"model": every weight; "adapter": LoRA weights only, over ``base``."""
    training_state: bool
    """Whether optimizer, schedule, RNG and data position are there, so that the run can be resumed."""
    params_dtype: str
    model_type: str
    stage: Optional[str] = None
    layout: dict[str, int] = field(default_factory=dict)
    base: Optional[str] = None
    """The Hugging Face model or checkpoint under an adapter."""
    peft: Optional[dict[str, Any]] = None
    adapter: Optional[dict[str, Any]] = None
    """Of an adapter that was trained elsewhere: ``modules`` (Hugging Face module -> [rank, alpha]) and the ``config``
    it came with."""
    hf_dtypes: dict[str, str] = field(default_factory=dict)
    """Hugging Face tensors that had another dtype than params_dtype where the weights came from, and that dtype."""
    consumed_samples: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    """Where the data goes on: ``epoch``, ``sample`` and what else the loader needs; the same at any layout."""
    arguments: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of every file of the checkpoint."""
    format: str = "primus_bridge/1"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def assets(self) -> Path:
        return self.folder / HF_ASSETS


def iteration_folder(save: Path, step: int) -> Path:
    return save / f"iter_{step:07d}"


def _versions() -> dict[str, str]:
    """Versions of the packages that decide what a checkpoint means."""
    names = ("torch", "megatron-core", "transformers")
    return {"primus-bridge": __version__} | {name: importlib.metadata.version(name) for name in names}


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def commit(folder: Path, manifest: Manifest) -> None:
    """Record every file's size and write the manifest: from here on the checkpoint counts."""
    manifest.files = _sizes(folder)
    manifest.versions = _versions()
    # the manifest is written last: a folder without one was never committed
    write_json(folder / MANIFEST, asdict(manifest))
    write_text(folder.parent / TRACKER, str(manifest.step))


def open_checkpoint(folder: Path) -> Checkpoint:
    """A committed checkpoint whose files are all there in their sizes. Raises ConfigError otherwise."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**values)
        if manifest.peft is not None:
            PeftArguments(**manifest.peft)
    except FileNotFoundError:
        raise ConfigError(f"is not a committed checkpoint: it has no {MANIFEST}", where=str(folder)) from None
    except (json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"not a manifest of a checkpoint: {error}", where=str(path)) from None
    for name, size in manifest.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise ConfigError(
                f"damaged checkpoint: {name} should have {size} bytes, it is {found}; "
                "remove the folder to go on from the checkpoint before it",
                where=str(folder),
            )
    return Checkpoint(folder, manifest)


def committed(save: Path) -> list[Path]:
    """Committed checkpoint folders under ``save``, oldest first."""
    matches = ((_ITERATION.match(path.name), path) for path in save.glob("iter_*"))
    found = [(int(match[1]), path) for match, path in matches if match and (path / MANIFEST).is_file()]
    return [path for _, path in sorted(found)]


def latest(save: Path) -> Optional[Checkpoint]:
    """The newest committed checkpoint, or None."""
    folders = committed(save) if save.is_dir() else []
    return open_checkpoint(folders[-1]) if folders else None


def find(path: Path) -> Checkpoint:
    """The checkpoint that ``load`` means: an iteration folder, or the newest one under a save folder.

    Raises ConfigError when there is none.
    """
    if not path.is_dir():
        raise ConfigError("no such checkpoint folder", where=str(path))
    if (path / MANIFEST).is_file():
        return open_checkpoint(path)
    found = latest(path)
    if found is None:
        raise ConfigError(
            "holds no committed checkpoint (iter_*/manifest.json); "
            "make one from a Hugging Face model: python -m primus.cli.convert --convert_from_hf",
            where=str(path),
        )
    return found


def keep_as_best(folder: Path, step: int, eval_loss: float) -> None:
    """Name a committed checkpoint as the best one of its run."""
    write_json(folder.parent / BEST, {"checkpoint": folder.name, "step": step, "eval_loss": eval_loss})


def best(save: Path) -> Optional[Path]:
    """The committed checkpoint that SAVE/best.json names, or None."""
    name = _read_best(save).get("checkpoint")
    return next((folder for folder in committed(save) if folder.name == name), None)


def forget_best(save: Path, evaluations: dict[int, Optional[float]]) -> None:
    """Remove SAVE/best.json unless its checkpoint is there, of an evaluation that the run has had.

    evaluations: step -> loss of those that the run goes on from.
    """
    named = _read_best(save)
    if best(save) is None or (named.get("step"), named.get("eval_loss")) not in list(evaluations.items()):
        (save / BEST).unlink(missing_ok=True)


def _read_best(save: Path) -> dict[str, Any]:
    try:
        named = json.loads((save / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return named if isinstance(named, dict) else {}


def prune(save: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` committed checkpoints and the best; each stops counting before its files go.

    One that cannot be removed is said on stderr: the new checkpoint stands, whatever became of an old one.
    """
    for folder in committed(save)[:-keep]:
        if folder == best(save):
            continue
        try:
            (folder / MANIFEST).unlink()
        except OSError as error:
            print(f"an old checkpoint could not be removed: {error}", file=sys.stderr, flush=True)
            continue
        shutil.rmtree(folder, ignore_errors=True)
