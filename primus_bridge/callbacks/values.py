"""What the callbacks of ours are given, checked where they are made: from a configuration or in Python."""

from __future__ import annotations

from typing import Any, Optional

from primus_bridge.config import schema
from primus_bridge.config.yaml_file import locate
from primus_bridge.errors import ConfigError


def checked(who: str, name: str, annotation: Any, value: Any) -> Any:
    """The value as the annotation wants it (an argument's, see schema.check). Raises ConfigError that names ``who``."""
    return schema.check(name, annotation, locate(value, who))


def steps(who: str, name: str, value: Any) -> int | None:
    """A number of steps or of evaluations, or None. Raises ConfigError for one below 1."""
    count = checked(who, name, Optional[int], value)
    if count is not None and count < 1:
        raise ConfigError(f"{name} {count} must be above 0", where=who)
    return count
