"""The fields of Megatron-Bridge's ConfigContainer, which it prints and no argument stands for: container_keys.yaml."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Optional

import yaml

WHOLE = "ConfigContainer"
"""The file's section of the fields that are in no section."""


@functools.cache
def _values() -> dict[str, dict[str, list[Any]]]:
    """Section -> field -> what it is where nobody set it, in one release or another."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = Path(__file__).with_name("container_keys.yaml").read_text(encoding="utf-8")
    return {
        section: {field: json.loads(values) for values, fields in groups.items() for field in fields}
        for section, groups in yaml.load(text, Loader=loader).items()
    }


def is_container_section(name: str) -> bool:
    return name != WHOLE and name in _values()


def unset_values(name: str) -> Optional[tuple]:
    """The values at which section.field, or a section as a whole, asks for nothing; None: the container has no such."""
    section, _, field = name.rpartition(".")
    if is_container_section(name):
        return (None,)
    values = _values().get(section or WHOLE, {}).get(field)
    return None if values is None else tuple(values)
