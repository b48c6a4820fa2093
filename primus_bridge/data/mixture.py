"""The sources of a run, as its configuration names them: one data_path, or several with weights; and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from primus_bridge.config.arguments import DatasetArguments
from primus_bridge.data.order import seeded_numbers, seeded_order
from primus_bridge.errors import ConfigError, did_you_mean

FOLLOWING = (
    "split",
    "max_samples",
    "dataset_format",
    "columns",
    "custom_format",
    "format_function",
    "oasst_paths",
    "languages",
    "include_unreviewed",
)
"""Keys of a source that follow ``dataset`` where the source does not say otherwise."""


@dataclass
class SourceSpec:
    """One source: where it is, and how its rows are read."""

    path: str
    name: str
    weight: float = 1.0
    """How often each sample comes in an epoch."""
    key: str = "dataset.data_path"
    """What the user sets to name it, for messages."""
    split: str = "train"
    max_samples: int | None = None
    dataset_format: str = "auto"
    columns: dict[str, Any] = field(default_factory=dict)
    custom_format: dict[str, Any] = field(default_factory=dict)
    format_function: str | None = None
    oasst_paths: str = "best"
    languages: list[str] = field(default_factory=list)
    include_unreviewed: bool = False


def train_sources(dataset: DatasetArguments) -> list[SourceSpec]:
    """The sources to train on. Raises ConfigError (key and mend) for what ``dataset.sources`` cannot mean."""
    following = {name: getattr(dataset, name) for name in FOLLOWING}
    if not dataset.sources:
        assert dataset.data_path is not None  # validated
        return [SourceSpec(dataset.data_path, _name(dataset.data_path), **following)]
    specs: list[SourceSpec] = []
    for number, given in enumerate(dataset.sources, start=1):
        key = f"source {number} of dataset.sources"
        known = [item.name for item in fields(SourceSpec) if item.name != "key"]
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown key '{name}' in {key}{did_you_mean(name, known)}")
        path = given.get("path")
        if not isinstance(path, str) or not path:
            raise ConfigError(f"{key} has no path: give it one, a data file, a folder, or a hub id")
        weight = given.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1000:
            raise ConfigError(
                f"weight {weight!r} of {key} must be a number above 0: how often each of its samples comes in an epoch"
            )
        values = following | {name: value for name, value in given.items() if name in FOLLOWING}
        _check_types(values, key)
        custom = next((name for name in ("custom_format", "format_function") if given.get(name)), None)
        if custom and values["dataset_format"] != "custom":
            raise ConfigError(f"{custom} of {key} is for dataset_format: custom; write that beside it")
        name = str(given.get("name") or _name(path))
        while name in (spec.name for spec in specs):
            name += "'"
        specs.append(SourceSpec(path, name, float(weight), f"path in {key}", **values))
    return specs


def _check_types(values: dict[str, Any], key: str) -> None:
    from primus_bridge.config import schema
    from primus_bridge.config.yaml_file import locate

    for name, value in values.items():
        schema.check(f"{name} in {key}", schema.fields()[f"dataset.{name}"], locate(value, key))


def validation_sources(dataset: DatasetArguments) -> list[SourceSpec]:
    """The separate validation set, if any: a file, or the named split of a folder or hub id; by default the one called
    validation, or a whole folder whose files name no split."""
    from primus_bridge.data.sources import names_splits

    path = dataset.validation_data_path
    if not path:
        return []
    following = {name: getattr(dataset, name) for name in FOLLOWING} | {"max_samples": None}
    place = Path(path).expanduser()
    whole = place.is_file() or place.is_dir() and not names_splits(place)
    following["split"] = dataset.validation_data_split or ("train" if whole else "validation")
    return [SourceSpec(path, _name(path), key="dataset.validation_data_path", **following)]


def _name(path: str) -> str:
    """A short name of a source: the last two parts of its path."""
    return "/".join(Path(path).parts[-2:]) if not path.startswith(("/", "~", ".")) else Path(path).name or path


def epoch_samples(sources: np.ndarray, weights: list[float], seed: Sequence[int], part: bool) -> np.ndarray | None:
    """The samples of one epoch, int64, by the weights of their sources; None when each comes once.

    sources: the source of each sample, int [samples]. A weight's whole part is how often each sample comes; its
    fraction is the part of the samples, chosen by seed, that comes once more: at least one, unless the samples are a
    ``part`` (a window) of the source, where a fraction of a sample comes in that fraction of the parts.
    """
    if all(weight == 1.0 for weight in weights):
        return None
    parts = []
    for source, weight in enumerate(weights):
        members = np.flatnonzero(sources == source)
        parts += [members] * int(weight)
        wanted = (weight - int(weight)) * len(members)
        key = (*seed, 0x3E16, source)
        if part:
            coin = seeded_numbers(len(members) + 1, *key)[-1] / 2**64
            extra = int(wanted) + (coin < wanted - int(wanted))
        else:
            extra = max(round(wanted), int(wanted > 0))
        parts.append(np.sort(members[seeded_order(len(members), *key)[:extra]]))
    return np.concatenate(parts).astype(np.int64)
