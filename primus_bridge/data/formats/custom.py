"""Formats of the user's own: texts with columns in braces, turns under other names, or a Python function."""

from __future__ import annotations

import functools
import hashlib
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from primus_bridge.data.formats import turns
from primus_bridge.data.formats.base import Format
from primus_bridge.data.formats.fields import answer, column, text
from primus_bridge.data.formats.imports import own_files
from primus_bridge.data.messages import Conversation, Message, RowError, Unusable
from primus_bridge.dotted import imported
from primus_bridge.errors import ConfigError, did_you_mean

FORMAT_KEY, FUNCTION_KEY = "dataset.custom_format", "dataset.format_function"
TEXT_KEYS = ("system", "user", "assistant")
TURNS_KEYS = ("turns", "role", "content", "roles")
BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def custom_format(mapping: dict[str, Any], function: str | None, columns: dict[str, str]) -> Format:
    """The format of ``dataset.custom_format`` or ``dataset.format_function``. Raises ConfigError naming the key."""
    if bool(mapping) == bool(function):
        which = "both are set: keep one" if function else "set one of them"
        raise ConfigError(f"dataset_format 'custom' takes {FORMAT_KEY} or {FUNCTION_KEY}; {which}", where=FORMAT_KEY)
    if function:
        return FunctionFormat(function, columns)
    return Format("custom", _turns(mapping) if "turns" in mapping else _texts(mapping), columns)


@dataclass
class Texts:
    """One exchange from ``{system, user, assistant}``: in each text ``{column}`` stands for the row's value, and ``{{``
    and ``}}`` for braces. Nothing else of the text is read: no attributes, no format specifications."""

    user: str
    assistant: str
    system: str = ""

    def __call__(self, data: dict[str, Any]) -> Conversation:
        said = [Message(role, _filled(getattr(self, role), data)) for role in ("user", "assistant")]
        answer(said[1].content, "assistant")
        if system := _filled(self.system, data):
            said.insert(0, Message("system", system))
        return turns.finished(said, data)


@dataclass
class Turns:
    """Conversations like ``messages`` under other names: column ``turns``, of objects with ``role`` and ``content``;
    ``roles``: theirs -> ours."""

    turns: str
    role: str
    content: str
    roles: dict[str, str]

    def __call__(self, data: dict[str, Any]) -> Conversation:
        found = column(data, self.turns)
        return turns.finished(turns.read(found, self.turns, self.role, self.content, self.roles), data)


class FunctionFormat(Format):
    """``function``: ``module.name`` of a function from a row to a conversation in OpenAI's shape (a mapping with
    ``messages``, or a list of messages), or to a list of those; None or an empty list leaves the row out.

    The module is imported from the installed packages or the current folder; it is the user's own code.
    """

    def __init__(self, function: str, columns: dict[str, str]):
        super().__init__("custom", functools.partial(_called, function), columns)
        self.function = function
        _imported(function)  # a wrong path is found here, not in a worker

    def fingerprint(self) -> str:
        """sha256 of the function's module and of all that it imports from the current folder."""
        digest = hashlib.sha256(self.function.encode())
        for name, file in sorted(own_files(self.function.rpartition(".")[0]).items()):
            digest.update(f"\n{name} ".encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


def _texts(mapping: dict[str, Any]) -> Texts:
    _check_keys(mapping, TEXT_KEYS, ("user", "assistant"))
    return Texts(**mapping)


def _turns(mapping: dict[str, Any]) -> Turns:
    _check_keys({key: value for key, value in mapping.items() if key != "roles"}, TURNS_KEYS, ("turns",))
    roles = mapping.get("roles") or turns.ROLES
    known = sorted({*turns.ROLES.values()})
    if not isinstance(roles, dict) or any(role not in known for role in roles.values()):
        raise ConfigError(f"roles must map the data's roles to {', '.join(known)}, found {roles!r}", where=FORMAT_KEY)
    names = {str(theirs): ours for theirs, ours in roles.items()}
    return Turns(mapping["turns"], mapping.get("role", "role"), mapping.get("content", "content"), names)


def _check_keys(mapping: dict[str, Any], known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    for key, value in mapping.items():
        if key not in known:
            hint = did_you_mean(key, known) or f"; known are {', '.join(known)}"
            raise ConfigError(f"unknown key '{key}'{hint}", where=FORMAT_KEY)
        if not isinstance(value, str) or not value:
            raise ConfigError(f"'{key}' must be text, found {value!r}", where=FORMAT_KEY)
    for key in needed:
        if key not in mapping:
            raise ConfigError(
                f"'{key}' is missing; give user and assistant texts with columns in braces, or turns: COLUMN",
                where=FORMAT_KEY,
            )


def _filled(template: str, data: dict[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        found = column(data, match[1])
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            return str(found)
        return text(found, match[1], optional=True)

    return BRACES.sub(value, template)


@functools.cache
def _imported(path: str) -> Callable[[dict[str, Any]], Any]:
    return imported(path, "function", example="my_formats.convert", where=FUNCTION_KEY)


def _called(path: str, data: dict[str, Any]) -> list[Conversation]:
    try:
        result = _imported(path)(data)
    except ConfigError:
        raise
    except Exception as error:  # the user's function may do anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RowError(
            FUNCTION_KEY, f"{path} raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        ) from error
    if not result:
        raise Unusable("filtered")
    several = isinstance(result, list) and not (isinstance(result[0], dict) and "role" in result[0])
    out = []
    for item in result if several else [result]:
        if isinstance(item, list):
            item = {"messages": item}
        if not isinstance(item, dict) or "messages" not in item:
            raise RowError(
                FUNCTION_KEY,
                f"{path} returned {item!r:.60}; expected a mapping with messages, a list of messages, or several",
            )
        try:
            out.append(turns.messages(item))
        except RowError as error:
            raise RowError(FUNCTION_KEY, f"{path} returned {error.column}: {error.message}") from None
    return out
