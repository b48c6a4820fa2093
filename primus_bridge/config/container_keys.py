"""The fields of Megatron-Bridge's ConfigContainer, which it prints and no argument stands for: container_keys.yaml."""

from __future__ import annotations

import functools
import json
from typing import Any, Optional

from primus_bridge.config.yaml_file import shipped_table

WHOLE = "ConfigContainer"
"""The file's section of the fields that are in no section."""


@functools.cache
def _values() -> dict[str, dict[str, list[Any]]]:
    """Section -> field -> what it is where nobody set it, in one release or another."""
    return {
        section: {field: json.loads(values) for values, fields in groups.items() for field in fields}
        for section, groups in shipped_table("container_keys.yaml").items()
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
