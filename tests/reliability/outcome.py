"""What a run has come to, read from its folder: losses, weights, optimizer and the rest; compared to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch

from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
from primus_bridge.checkpoint.manifest import MANIFEST, Checkpoint, latest
from primus_bridge.checkpoint.safe_load import load_plain

SAME = ("step", "loss", "grad_norm", "lr", "supervised_tokens", "tokens", "eval_loss")
"""What a line of metrics.jsonl says of the training, not of the machine."""

PARTS = ("losses", "weights", "optimizer", "rest")


@dataclass
class Outcome:
    """What must be equal to the bit, by part, each a mapping from a name to a value or tensor."""

    losses: dict[str, Any]
    """The lines of metrics.jsonl in their order."""
    weights: dict[str, Any]
    optimizer: dict[str, Any]
    rest: dict[str, Any]
    """The manifest's place in the training, and what the other files hold (RNG, schedule, place in the data)."""


def read_outcome(save: Path) -> Outcome:
    """Of the newest committed checkpoint under ``save`` and the history beside it. Raises ConfigError without one."""
    checkpoint = latest(save)
    assert checkpoint is not None, f"{save} holds no committed checkpoint"
    history = read_history(save / METRICS_FILE)
    lines = [{key: entry[key] for key in SAME if key in entry} for entry in history]
    tensors = _tensors(checkpoint.folder)
    return Outcome(
        losses={f"line {number}": line for number, line in enumerate(lines, 1)},
        weights={name: value for name, value in tensors.items() if not name.startswith("optimizer.")},
        optimizer={name: value for name, value in tensors.items() if name.startswith("optimizer.")},
        rest=_place(checkpoint) | _files(checkpoint.folder),
    )


def differences(one: Outcome, other: Outcome) -> dict[str, list[str]]:
    """By part, the names whose values differ or which only one of them has."""
    found = {}
    for part in PARTS:
        mine, theirs = getattr(one, part), getattr(other, part)
        names = [name for name in mine if name not in theirs or not _equal(mine[name], theirs[name])]
        found[part] = names + [name for name in theirs if name not in mine]
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        # bytes: NaN equals itself and -0.0 is not 0.0
        same_type = one.dtype == other.dtype and one.shape == other.shape
        return same_type and torch.equal(_bytes(one), _bytes(other))
    return type(one) is type(other) and bool(one == other)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a torch_dist checkpoint, whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def _place(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {"step": manifest.step, "consumed_samples": manifest.consumed_samples}


def _files(folder: Path) -> dict[str, Any]:
    """What the other files hold: all but the shards, which are read as tensors, and the manifest, which holds paths."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            # not its bytes: equal values are pickled otherwise where they are one object
            found |= dict(_leaves(load_plain(path, name), name))
        elif path.is_file() and path.suffix != ".distcp" and path.name not in (".metadata", MANIFEST):
            found[name] = path.read_bytes()
    return found


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every value in nested mappings and sequences, under its path."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, part in items:
        yield from _leaves(part, f"{name}/{key}")
