"""config/container_keys.yaml: the fields of Megatron-Bridge's ConfigContainer with their defaults, of every release.

python -m tests.bridge.containers CASES.json OUT.json DEFAULTS.json      in each release's environment
python -m tests.bridge.container_keys DEFAULTS.json DEFAULTS.json        writes the file again
"""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from primus_bridge.config.container_keys import WHOLE

FILE = Path(__file__).parents[2] / "primus_bridge" / "config" / "container_keys.yaml"
HEAD = """\
# The fields of Megatron-Bridge's ConfigContainer, of every release that engine bridge knows: section -> what fields are
# where nobody set them, as JSON -> fields. What bridge/fields.py sets in every run is among the values.
# Written by tests/bridge/container_keys.py.
"""
CLASSES = {
    "model": ["megatron.bridge.models.gpt_provider:GPTModelProvider"],
    "dataset": [
        "primus_bridge.bridge.dataset:PrimusSamples",
        "megatron.bridge.training.config:FinetuningDatasetConfig",
        "megatron.bridge.data.builders.gpt_sft:GPTSFTDatasetConfig",
        "megatron.bridge.data.builders.direct_hf_sft:DirectHFSFTDatasetConfig",
    ],
    # not DoRA, whose mere name asks for something
    "peft": ["megatron.bridge.peft.lora:LoRA", "megatron.bridge.peft.canonical_lora:CanonicalLoRA"],
    "comm_overlap": ["megatron.bridge.training.comm_overlap:CommOverlapConfig"],
    "mixed_precision": ["megatron.bridge.training.mixed_precision:MixedPrecisionConfig"],
    "validation": ["megatron.training.config.training_config:ValidationConfig"],
}
"""Where the container's annotation is a choice, or a base class."""


Defaults = dict[str, dict[str, list]]


def defaults() -> Defaults:
    """Of the installed release, as it prints them."""
    import typing

    from primus_bridge.bridge.engine import imported, installed

    config = imported("megatron.bridge.training.config")
    out: Defaults = {WHOLE: _fields(config.ConfigContainer)}
    del out[WHOLE]["_target_"]
    hints = typing.get_type_hints(config.ConfigContainer)
    for field in dataclasses.fields(config.ConfigContainer):
        kinds = [hints[field.name], *typing.get_args(hints[field.name])]
        found = [_class(name) for name in CLASSES.get(field.name, ())] or kinds
        known = [kind for kind in found if dataclasses.is_dataclass(kind)]
        if known:
            out[WHOLE].pop(field.name, None)
        for kind in known:
            _add(out.setdefault(field.name, {}), _fields(kind))
    for name, value in installed().fixed.items():
        section, _, key = name.partition(".")
        if key != "dataloader_type":  # which in a user's file is about the order of the rows
            _add(out[section], {key: [value]})
    return out


def _class(name: str) -> Any:
    """The class module:name, None where this release has none."""
    import importlib

    module, _, kind = name.partition(":")
    try:
        return getattr(importlib.import_module(module), kind, None)
    except ModuleNotFoundError:
        return None


def _fields(kind: Any) -> dict[str, list]:
    """Field -> its default as declared, and as an object without arguments has it."""
    out: dict[str, list] = {"_target_": [f"{kind.__module__}.{kind.__qualname__}"]}
    try:
        made = kind()
    except Exception:  # it needs arguments, or the size of a world
        made = None
    for field in dataclasses.fields(kind):
        if field.name.startswith("_") or not (field.init or made is not None):
            continue
        values = []
        if field.default is not dataclasses.MISSING:
            values.append(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values.append(field.default_factory())
        if made is not None:
            values.append(getattr(made, field.name, None))
        _add(out, {field.name: [_printed(value) for value in values]})
    return out


def _printed(value: Any) -> Any:
    """The value as the container prints it, read again."""
    from primus_bridge.bridge.engine import imported

    config = imported("megatron.bridge.training.config")
    utils = imported("megatron.bridge.utils.yaml_utils")
    with utils.safe_yaml_representers():
        text = yaml.safe_dump(config.ConfigContainer._convert_value_to_dict(value))
    return yaml.safe_load(text)


def _add(to: dict[str, list], more: dict[str, list]) -> None:
    for key, values in more.items():
        known = to.setdefault(key, [])
        for value in values:
            if not has(known, value):
                known.append(value)


def has(known: Sequence, value: Any) -> bool:
    return repr(value) in map(repr, known)  # False is not 0


def main(*files: str) -> None:
    table: Defaults = {}
    for file in files:
        for section, keys in json.loads(Path(file).read_text()).items():
            _add(table.setdefault(section, {}), keys)
    groups: dict[str, dict[str, list[str]]] = {}
    for section in sorted(table):
        groups[section] = {}
        for key in sorted(table[section]):
            values = json.dumps(sorted(table[section][key], key=repr), sort_keys=True)
            groups[section].setdefault(values, []).append(key)
    FILE.write_text(HEAD + "".join(f"{section}:\n{_text(groups[section])}" for section in groups))


def _text(groups: dict[str, list[str]]) -> str:
    """A section's groups as YAML, in lines of 120; a long key is a line of its own."""
    lines = []
    for values, keys in sorted(groups.items()):
        names = f"{', '.join(keys)}]"
        if len(values) < 60:
            lines += _wrapped(f"  '{values}': [{names}")
        else:
            lines += [*_wrapped(f"  ? '{values}'"), *_wrapped(f"  : [{names}")]
    return "".join(f"{line}\n" for line in lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
