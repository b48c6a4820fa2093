"""What an argument may be: dotted names of BridgeArguments, their types, and the check of one value."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from typing import Any, Literal, Optional, Union

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.yaml_file import Located, parse_text, plain
from primus_bridge.errors import ConfigError, did_you_mean

MAPPING, MAPPINGS = dict[str, Any], list[dict[str, Any]]

WORDS_TRUE = ("true", "yes", "on", "1")
WORDS_FALSE = ("false", "no", "off", "0")
WORDS_NULL = ("null", "none")


@functools.cache
def fields() -> dict[str, Any]:
    """Dotted name -> annotation, in the order of BridgeArguments: 'stage', 'model.seq_length', ..."""
    found: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(BridgeArguments).items():
        if name in ("sources", "notes", "shape"):
            continue
        if dataclasses.is_dataclass(annotation):
            found.update({f"{name}.{key}": kind for key, kind in typing.get_type_hints(annotation).items()})
        else:
            found[name] = annotation
    return found


def get(arguments: BridgeArguments, dotted: str) -> Any:
    """The value of 'optimizer.lr' or 'stage'."""
    return functools.reduce(getattr, dotted.split("."), arguments)


def put(arguments: BridgeArguments, dotted: str, value: Any, source: str) -> None:
    """Set 'optimizer.lr' and remember where it came from."""
    *path, name = dotted.split(".")
    setattr(functools.reduce(getattr, path, arguments), name, value)
    arguments.sources[dotted] = source


def is_bool(annotation: Any) -> bool:
    """True when a flag without a value means True."""
    return _bare(annotation)[0] is bool


def is_optional(annotation: Any) -> bool:
    """True when null is a value of it."""
    return _bare(annotation)[1]


def is_list(annotation: Any) -> bool:
    """True when several words of a command line form one value."""
    return _bare(annotation)[0] in (list[str], list[int])


def check(name: str, annotation: Any, node: Located) -> Any:
    """The value as the annotation wants it (an int becomes a float; text of the command line becomes what is meant).

    Raises ConfigError with file:line, the key as the user wrote it, and what was expected.
    """
    kind, optional = _bare(annotation)
    value, raw = node.value, node.raw
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    # of a choice that is itself "none", the word means that one
    if optional and raw not in choices and (value is None or (raw is not None and raw.lower() in WORDS_NULL)):
        return None
    if choices:
        return _choice(name, choices, raw if raw is not None else value, optional, node.where)
    accepted = _accept(kind, value, raw)
    if accepted is None:
        raise ConfigError(
            f"'{name}' must be {expected(annotation)}, got {shown(value)}{_mend(kind, value)}", where=node.where
        )
    return accepted[0]


def expected(annotation: Any) -> str:
    """The annotation in words: 'a whole number', 'true or false', 'one of ...'."""
    kind, optional = _bare(annotation)
    if typing.get_origin(kind) is Literal:
        words = "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    elif kind == list[str]:
        words = "a list of names"
    elif kind == list[int]:
        words = "a list of whole numbers"
    elif kind in (MAPPING, MAPPINGS):
        words = "a mapping of names" if kind == MAPPING else "a list of paths or mappings"
    else:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    return f"{words}, or null" if optional else words


def _bare(annotation: Any) -> tuple[Any, bool]:
    """(type without Optional, whether None is allowed)"""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        inner = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        assert len(inner) == 1, annotation
        return inner[0], True
    return annotation, False


def _choice(name: str, choices: tuple, value: Any, optional: bool, where: str) -> Any:
    if isinstance(value, str) and value in choices:
        return value
    listed = ", ".join(str(choice) for choice in choices) + (", or null" if optional else "")
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    raise ConfigError(f"'{name}' must be one of {listed}; got {shown(value)}{hint}", where=where)


def _accept(kind: Any, value: Any, raw: Optional[str]) -> Optional[tuple[Any]]:
    """(the value,) or None when it does not fit."""
    if kind is bool:
        if isinstance(value, bool):
            return (value,)
        if raw is not None and raw.lower() in WORDS_TRUE + WORDS_FALSE:
            return (raw.lower() in WORDS_TRUE,)
        return None
    if kind is str:
        text = raw if raw is not None else value
        return (text,) if isinstance(text, str) and text != "" else None
    if kind in (MAPPING, MAPPINGS):
        return _structure(kind, parse_text(raw) if raw is not None else value)
    if typing.get_origin(kind) is list:
        if raw is not None:
            value = [item for item in re.split(r"[,\s]+", raw.strip("[]")) if item]
        if kind == list[int]:
            return _numbers(value)
        fits = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
        return (list(value),) if fits else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    if kind is float:
        return (float(value),)
    return (value,) if isinstance(value, int) else None


def _numbers(value: Any) -> Optional[tuple[list[int]]]:
    """A list of whole numbers, which a command line gives as text; one alone needs no list."""
    items = value if isinstance(value, list) else [value]
    found = [int(item) if isinstance(item, str) and item.isdecimal() else item for item in items]
    return (found,) if all(isinstance(item, int) and not isinstance(item, bool) for item in found) else None


def _structure(kind: Any, value: Any) -> Optional[tuple[Any]]:
    """A mapping, or a list of mappings (a bare text among them is a path, and one alone needs no list), as plain dicts
    with text keys."""
    value = plain(value)
    if kind == MAPPING:
        return (value,) if isinstance(value, dict) and all(isinstance(key, str) for key in value) else None
    if isinstance(value, str) or (isinstance(value, dict) and "path" in value):
        value = [value]
    if not isinstance(value, list):
        return None
    items = [{"path": item} if isinstance(item, str) else plain(item) for item in value]
    return (items,) if all(isinstance(item, dict) for item in items) else None


def shown(value: Any) -> str:
    """The value as YAML would write it: null, true, text in quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section"
    return repr(value) if isinstance(value, str) else str(value)


def typed(value: Any) -> str:
    """The value as a command line would have it."""
    if isinstance(value, dict) or (isinstance(value, list) and (not value or isinstance(value[0], dict))):
        return json.dumps(value)
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else shown(value)


def _mend(kind: Any, value: Any) -> str:
    """What to do about it, where that is plain."""
    if value is None:
        return ": leave the key out for its default"
    if kind is bool and value in (0, 1):
        return f": write {'true' if value else 'false'}"
    if kind is str and isinstance(value, (int, float)):
        return ": put it in quotes"
    if kind in (int, float) and isinstance(value, str):
        low, _, high = value.partition("-")
        if low.isdigit() and high.isdigit():
            return f", a range: choose one, such as {low}"
        try:
            float(value)
        except ValueError:
            return ""
        return ": remove the quotes"
    return ""
