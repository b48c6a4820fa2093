"""Checkpoint folders and their manifests: SAVE/iter_0000100/manifest.json is written last and is the commit mark."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from primus_bridge import __version__
from primus_bridge.config.arguments import PeftArguments
from primus_bridge.errors import ConfigError
from primus_bridge.files import check_writable, file_digest, sync_folder, write_json, write_text

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best.json"
"""SAVE/best.json: checkpoint, step and eval_loss of the best evaluation, where a run keeps that checkpoint."""
HF_ASSETS = "hf_assets"
"""Folder inside a checkpoint: config.json, tokenizer, chat template and generation config of the model."""
FORMAT = "primus_bridge/2"
OLD_FORMAT = "primus_bridge/1"
"""Without checksums and components: its weights can be read, its run cannot be continued."""
ITERATION = re.compile(r"^iter_(\d{7,})$")
ASIDE = "damaged_"
"""Before the name of a checkpoint that a run found damaged, and passed over."""
_COMPONENT = {
    "key": str,
    "pattern": str,
    "group": Optional[str],
    "required": bool,
    "ranks": list[list[int]],
    "files": list[str],
    "bytes": int,
}


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
    arguments: dict[str, Any] = field(default_factory=dict)
    arguments_digest: Optional[str] = None
    """Equal for two runs that ask for the same."""
    base_digest: Optional[str] = None
    """Of the weights of ``base``."""
    versions: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    groups: dict[str, list[list[int]]] = field(default_factory=dict)
    """The process groups that components name: their ranks."""
    components: list[dict[str, Any]] = field(default_factory=list)
    """Of every state component: key, pattern, group, required, ranks (of each copy), files, bytes."""
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of every file of the checkpoint."""
    checksums: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file of the checkpoint, in hexadecimal digits."""
    checksum: Optional[str] = None
    """manifest_checksum of these values as they were committed."""
    format: str = FORMAT


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


def step_of(folder: Path) -> int:
    """The step of an ``iteration_folder``."""
    return int(folder.name.removeprefix("iter_"))


def _versions() -> dict[str, str]:
    """Versions of the packages that decide what a checkpoint means."""
    names = ("torch", "megatron-core", "transformers")
    return {"primus-bridge": __version__} | {name: importlib.metadata.version(name) for name in names}


def commit(folder: Path, manifest: Manifest, checksums: dict[str, str]) -> None:
    """Record every file's size and checksum and write the manifest: from here on the checkpoint counts.

    A machine that loses power at any moment has the whole checkpoint or no manifest of it; when this returns, it has
    the checkpoint, and older ones may go.
    checksums: of the files that a HashingFile brought to the disk; the others are read, and brought there.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    names = {str(path.relative_to(folder)): path for path in files}
    manifest.files = {name: path.stat().st_size for name, path in names.items()}
    manifest.checksums = {name: checksums.get(name) or file_digest(path, sync=True) for name, path in names.items()}
    manifest.versions = _versions()
    for path in {folder, *(path.parent for path in files)}:
        sync_folder(path)
    values = asdict(manifest)
    # the manifest is written last: a folder without one was never committed
    write_json(folder / MANIFEST, values | {"checksum": manifest_checksum(values)})
    sync_folder(folder)
    sync_folder(folder.parent)
    write_text(folder.parent / TRACKER, str(manifest.step))


def manifest_checksum(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest's values but its own checksum, as JSON with sorted keys, in hexadecimal digits."""
    # as a reader finds them: keys are strings, and a tuple is a list
    plain = json.loads(json.dumps({name: value for name, value in values.items() if name != "checksum"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """A committed checkpoint whose files are all there in their sizes. Raises ConfigError otherwise."""
    checkpoint = Checkpoint(folder, read_manifest(folder))
    for name in checkpoint.manifest.files:
        wrong = wrong_size(checkpoint, name)
        if wrong is not None:
            raise ConfigError(f"damaged checkpoint: {wrong}", where=str(folder))
    return checkpoint


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint, whose files are not looked at. Raises ConfigError for one that is none.

    Its values are of the kinds that Manifest says and, but in manifests older than that, have its own checksum; every
    file that it names is one inside ``folder``; an iteration's folder is named for its step.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}")
        if values.get("format", FORMAT) not in (FORMAT, OLD_FORMAT):
            raise TypeError(f"its format is {values['format']}, and this version of primus_bridge reads {FORMAT}")
        if values.get("format") == OLD_FORMAT:
            values.pop("data", None)
        manifest = Manifest(**values)
        _check_kinds(manifest)
        unsigned = manifest.format == OLD_FORMAT and manifest.checksum is None
        altered = not unsigned and manifest.checksum != manifest_checksum(values)
        names = [*manifest.files, *manifest.checksums]
        names += [name for component in manifest.components for name in component["files"]]
        home = folder.resolve()
        # an absolute name, a way up, or a link: what follows would read and trust a file of somebody else
        outside = [name for name in dict.fromkeys(names) if not (home / name).resolve().is_relative_to(home)]
    except FileNotFoundError:
        raise ConfigError(f"is not a committed checkpoint: it has no {MANIFEST}", where=str(folder)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: nested too deep, or links in a circle
        raise ConfigError(f"is not a manifest of a checkpoint: {error}", where=str(path)) from None
    if altered:
        raise ConfigError("differs from its checksum: it is damaged, or was altered", where=str(path))
    if outside:
        raise ConfigError(
            f"damaged or hostile checkpoint: it names a file outside its folder, {outside[0]}; do not use this folder",
            where=str(path),
        )
    if ITERATION.match(folder.name) and step_of(folder) != manifest.step:
        right = iteration_folder(folder.parent, manifest.step).name
        raise ConfigError(
            f"holds step {manifest.step}, and its folder is named for step {step_of(folder)}: give it back its name, "
            f"{right}",
            where=str(folder),
        )
    return manifest


def _check_kinds(manifest: Manifest) -> None:
    """Raises TypeError that names a value of another kind than its annotation: what reads it relies on that."""
    _check_values("", vars(manifest), get_type_hints(Manifest))
    for number, component in enumerate(manifest.components):
        _check_values(f"components[{number}].", component, _COMPONENT)
    if manifest.peft is not None:
        _check_values("peft.", vars(PeftArguments(**manifest.peft)), get_type_hints(PeftArguments))
    if manifest.adapter is not None:
        _check_values("adapter.", manifest.adapter, {"modules": dict[str, list[float]], "config": dict[str, Any]})
        if any(len(rank_and_alpha) != 2 for rank_and_alpha in manifest.adapter["modules"].values()):
            raise TypeError("its adapter.modules are not all a rank and an alpha")


def _check_values(prefix: str, values: dict[str, Any], kinds: dict[str, Any]) -> None:
    for name, kind in kinds.items():
        if name not in values:
            raise TypeError(f"it has no {prefix}{name}")
        if not _fits(values[name], kind):
            raise TypeError(f"its {prefix}{name} is no {inspect.formatannotation(kind)}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is what an annotation says; a whole number is a float too."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return value in inside
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, inside[1]) for one in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inside[0]) for one in value)
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def wrong_size(checkpoint: Checkpoint, name: str) -> Optional[str]:
    """What is wrong with one of a checkpoint's files by its size; None when it is as the manifest has it."""
    path, size = checkpoint.folder / name, checkpoint.manifest.files[name]
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    if found == size:
        return None
    return f"{name} should have {size} bytes, it is {'missing' if found is None else f'{found} bytes'}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint, whole or not, and no save folder."""
    return (folder / MANIFEST).is_file() or ITERATION.match(folder.name.removeprefix(ASIDE)) is not None


def check_save_folder(folder: Path, what: str) -> None:
    """Raises ConfigError when no checkpoints could be saved in ``folder``; creates nothing."""
    check_writable(folder, what)
    if is_checkpoint(folder):
        raise ConfigError(
            "is one checkpoint, or has the name of one: give the save folder that holds it, "
            f"{folder.absolute().parent}, or another --save (and --load this one, to start from it)",
            where=str(folder),
        )


def committed(save: Path) -> list[Path]:
    """Committed checkpoint folders under ``save``, oldest first."""
    found = [path for path in save.glob("iter_*") if ITERATION.match(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def latest(save: Path) -> Optional[Checkpoint]:
    """The newest committed checkpoint, or None."""
    folders = committed(save) if save.is_dir() else []
    return open_checkpoint(folders[-1]) if folders else None


def find(path: Path) -> Checkpoint:
    """The checkpoint that ``load`` means: an iteration folder, or the newest one under a save folder.

    Raises ConfigError when there is none.
    """
    return open_checkpoint(candidates(path)[0])


def candidates(path: Path) -> list[Path]:
    """The folders that ``load`` may mean, the first before the others: an iteration, or those of a save folder.

    Raises ConfigError when there is none.
    """
    if not path.is_dir():
        raise ConfigError("no such checkpoint folder", where=str(path))
    found = [path] if (path / MANIFEST).is_file() else committed(path)[::-1]
    if not found:
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
