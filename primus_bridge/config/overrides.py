"""The overrides of a command line: ``--key value``, ``--flag``, ``--a.b value``, ``a.b=value`` -> one layer."""

from __future__ import annotations

from typing import Callable

from primus_bridge.config import schema
from primus_bridge.config.merge import Layer, Table, Target, apply, container_field, find, unknown_key
from primus_bridge.config.yaml_file import Located, parse_scalar
from primus_bridge.errors import ConfigError


def read_overrides(words: list[str], table: Table, elsewhere: Callable[[str], str] = lambda name: "") -> Layer:
    """The words in their order; a later one replaces a former one of the same argument.

    A flag of a true-or-false argument needs no value; a list takes ``a,b`` or several words. Raises ConfigError for an
    unknown key (with a suggestion), a missing value, or a word that belongs to nothing. elsewhere: what to say of a key
    that another spelling has.
    """
    layer = Layer(later_wins=True)
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        key, equals, text = word.partition("=")
        name = key.removeprefix("--").replace("-", "_")
        if not word.startswith("--") and not (equals and name):
            raise ConfigError(
                f"unexpected argument '{word}': overrides are --key value, --flag, or key=value", where="command line"
            )
        where = f"command line {key}" if key.startswith("--") else f"command line {key}="
        entry = find(table, name) or container_field(name)
        if entry is None:
            raise unknown_key(table, name, where, elsewhere(name))
        values = [text]
        if not equals:
            values = _values(entry, words[index:])
            index += len(values)
        if not values:
            if not (isinstance(entry, Target) and schema.is_bool(entry.annotation)):
                raise ConfigError(f"'{name}' needs a value: {key} VALUE", where=where)
            values = ["true"]
        raw = ",".join(values)
        apply(entry, name, Located(parse_scalar(raw), where, raw), layer)
    return layer


def _values(entry, following: list[str]) -> list[str]:
    """The words after a flag that are its value."""
    if not following or following[0].startswith("--"):
        return []
    annotation = entry.annotation if isinstance(entry, Target) else str
    if schema.is_bool(annotation):
        words = schema.WORDS_TRUE + schema.WORDS_FALSE + schema.WORDS_NULL
        return following[:1] if following[0].lower() in words else []
    if schema.is_list(annotation):
        count = next((i for i, word in enumerate(following) if word.startswith("--") or "=" in word), len(following))
        return following[:count]
    return following[:1]
