"""Which arguments a run that goes on has otherwise than the run that saved the checkpoint."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Mapping

from primus_bridge.checkpoint.manifest import Manifest
from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments

UNCOMPARED = (
    "framework",
    "engine",
    # where things lie and when they are written; model, adapter and vocabulary are compared by what they are
    "checkpoint",
    "tokenizer",
    "shape",
    "logger",
    "profiling",
    "dist",
    "dataset.num_workers",
    "train.exit_after_save",
)
"""Sections and arguments that no number of a run depends on."""


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> plain value: mappings and lists of mappings by their parts; one that is empty has none."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        _flatten(name, value, found)
    return found


def _flatten(name: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _flatten(f"{name}.{key}", part, found)
    elif isinstance(value, (list, tuple)) and all(isinstance(part, (Mapping, list, tuple)) for part in value):
        for index, part in enumerate(value):
            _flatten(f"{name}[{index}]", part, found)
    else:
        found[name] = value


def compared(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of the arguments (``to_dict()``) that the numbers of a run may depend on."""
    return {
        name: value
        for name, value in flat(arguments).items()
        if not any(name == one or name.startswith((f"{one}.", f"{one}[")) for one in UNCOMPARED)
    }


def arguments_digest(arguments: BridgeArguments) -> str:
    """SHA-256, in hexadecimal digits, of what is compared: equal for two runs that ask for the same."""
    values = json.dumps(compared(arguments.to_dict()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(values.encode()).hexdigest()


def changed_arguments(manifest: Manifest, arguments: BridgeArguments) -> list[str]:
    """A line for each argument that a resumed run has otherwise than the run that saved the checkpoint.

    One that only the newer of two versions knows is listed where it is not what it is by default.
    """
    if manifest.arguments_digest == arguments_digest(arguments):
        return []
    before, now = compared(manifest.arguments), compared(arguments.to_dict())
    usual = compared(BridgeArguments().to_dict())
    lines = []
    for name in [*now, *(name for name in before if name not in now)]:
        if name in before and name in now:
            differs = before[name] != now[name]
        else:
            differs = name in before or now[name] != usual.get(name)
        if differs:
            lines.append(changed(name, _said(before, name), _said(now, name), arguments))
    return lines


def changed(name: str, before: str, now: str, arguments: BridgeArguments) -> str:
    """A line on one argument, or a part of one, with both values and where the run's comes from."""
    field = next((one for one in schema.fields() if name == one or name.startswith((f"{one}.", f"{one}["))), None)
    if field is None:
        return f"{name}: {before} in the checkpoint, not known to this version"
    return f"{name}: {before} in the checkpoint, {now} now ({arguments.sources.get(field, 'default')})"


def _said(values: Mapping[str, Any], name: str) -> str:
    return schema.shown(values[name]) if name in values else "not set"
