"""${NAME} and ${NAME:default} in a configuration, replaced from the environment before anything else is read."""

from __future__ import annotations

import os
import re
from typing import Any

from primus_bridge.config.yaml_file import Located, parse_scalar
from primus_bridge.errors import ConfigError

PATTERN = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}")


def substitute(node: Located) -> Located:
    """The tree with its variables filled in.

    A value that is one variable takes the type of its text (``${N:8}`` is a number, ``${X:null}`` is None);
    inside a longer text it is pasted. Raises ConfigError, naming the variable, when it is unset without a default.
    """
    value = node.value
    if isinstance(value, dict):
        return Located({key: substitute(item) for key, item in value.items()}, node.where)
    if isinstance(value, list):
        return Located([_typed(item, node.where)[0] for item in value], node.where)
    value, raw = _typed(value, node.where)
    return Located(value, node.where, node.raw if raw is None else raw)


def _typed(value: Any, where: str) -> tuple[Any, str | None]:
    if not isinstance(value, str) or "${" not in value:
        return value, None
    nested = any("${" in (match.group(2) or "") for match in PATTERN.finditer(value))
    if nested or "${" in PATTERN.sub("", value):
        raise ConfigError(f"cannot read '{value}': write ${{NAME}} or ${{NAME:default}}, without nesting", where=where)
    text = PATTERN.sub(lambda match: _lookup(match, where), value)
    if PATTERN.fullmatch(value):
        return parse_scalar(text), text
    return text, None


def _lookup(match: re.Match, where: str) -> str:
    name, default = match.group(1), match.group(2)
    value = os.environ.get(name)
    if value is not None:
        return value
    if default is None:
        raise ConfigError(
            f"the environment variable {name} is not set and ${{{name}}} has no default: "
            f"set it, or write ${{{name}:value}}",
            where=where,
        )
    return default
