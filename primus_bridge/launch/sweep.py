"""A grid of runs: ``--sweep lora_rank=8,16 --sweep lr=1e-4,2e-4`` is four points, each with a folder of its own."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from typing import Any, Optional

from primus_bridge.config import BridgeArguments, load_arguments, primus, sft
from primus_bridge.config.merge import Target, find
from primus_bridge.errors import ConfigError

WHERE = "command line --sweep"

OWN_FOLDERS = ("save", "hf_save_path")
"""What differs between the points anyway."""

LABEL_LENGTH = 120
"""A label is a folder's name, which may have 255 bytes."""


@dataclass(frozen=True)
class Point:
    """One run of the grid.

    label: 'lora_rank=8_lr=1e-4', the name of its folder; '' for the only one without a grid. words: what its command
    line has beside the config.
    """

    label: str
    words: list[str]
    arguments: BridgeArguments


def points(config: Optional[str], overrides: list[str], stage: Optional[str], sweeps: list[str]) -> list[Point]:
    """The runs of a command, in the order of the grid (the last axis changes fastest), each saving to SAVE/LABEL.

    Raises ConfigError for an axis that is not ``name=a,b``, for two points that are one, and for what load_arguments
    refuses. The arguments are not validated yet.
    """
    base = load_arguments(config, overrides, stage)
    if not sweeps:
        return [Point("", overrides, base)]
    axes = dict(_axis(text) for text in sweeps)
    if len({_argument(name) for name in axes}) < len(sweeps):
        raise ConfigError("an argument is swept twice: give all its values in one --sweep", where=WHERE)
    if base.checkpoint.hf_save_path is not None:
        raise ConfigError(
            "hf_save_path is one folder for all points: leave it out, each point exports into its own save folder",
            where=base.sources["checkpoint.hf_save_path"],
        )
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        label = _label(chosen)
        own = [f"--{name}={value}" for name, value in chosen.items()]
        words = [*overrides, *own, f"--save={base.save_folder / label}"]
        found.append(Point(label, words, load_arguments(config, words, stage)))
    for (one, run), (other, same) in itertools.combinations([(p.label, _without_save(p)) for p in found], 2):
        if one == other:
            raise ConfigError(f"two points of the grid have the folder {one}: give each value once", where=WHERE)
        if run == same:
            raise ConfigError(f"{one} and {other} are the same run: give each value once", where=WHERE)
    return found


def _label(chosen: dict[str, str]) -> str:
    label = "_".join(re.sub(r"[^\w.,=+-]+", "-", f"{name}={value}") for name, value in chosen.items())
    if len(label.encode()) <= LABEL_LENGTH:
        return label
    digest = hashlib.sha256(repr(chosen).encode()).hexdigest()[:8]
    return f"{label.encode()[: LABEL_LENGTH - 9].decode(errors='ignore')}-{digest}"


def _argument(name: str) -> str:
    """The argument that a name sets: lr and training.lr are one."""
    entry = find({**primus.table(), **sft.KEYS}, name)
    return entry.argument if isinstance(entry, Target) else name


def _without_save(point: Point) -> dict[str, Any]:
    what = point.arguments.to_dict()
    return {**what, "checkpoint": {**what["checkpoint"], "save": None}}


def _axis(text: str) -> tuple[str, list[str]]:
    """'lr=1e-4,2e-4' -> ('lr', ['1e-4', '2e-4']); commas inside brackets belong to a value."""
    name, equals, listed = text.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    values = [value.strip() for value in re.split(r",(?![^\[]*\])", listed)]
    if not name or not equals or not all(values):
        raise ConfigError(f"--sweep takes NAME=VALUE,VALUE, not '{text}'", where=WHERE)
    if name.rpartition(".")[2] in OWN_FOLDERS:
        raise ConfigError(f"'{name}' cannot be swept: each point has its own folder below save", where=WHERE)
    return name, values
