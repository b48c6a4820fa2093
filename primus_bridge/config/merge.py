"""Merging layers of settings: every key known or refused, every value typed, every value with its source."""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Mapping, Optional, Union

from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.container_keys import is_container_section, unset_values
from primus_bridge.config.follow import keep_later, take_back
from primus_bridge.config.names import checked
from primus_bridge.config.yaml_file import Located, plain
from primus_bridge.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Target:
    """An alias of one argument.

    kind: the type the user writes, where it is not the argument's own (``use_lora: true`` sets a name).
    translate: from what the user wrote to the argument's value; raises ValueError with the reason.
    also: other arguments that what the user wrote sets.
    otherwise: those that it sets where nothing else beside it does.
    null_says_nothing: in a preset of Primus's, although null is a value of the argument.
    yields: it says nothing beside the argument's own name.
    """

    argument: str
    kind: Any = None
    translate: Optional[Callable[[Any], Any]] = None
    also: Optional[Callable[[Any], dict[str, Any]]] = None
    otherwise: Optional[Callable[[Any], dict[str, Any]]] = None
    null_says_nothing: bool = False
    yields: bool = False

    @property
    def annotation(self) -> Any:
        return self.kind if self.kind is not None else schema.fields()[self.argument]


@dataclass(frozen=True)
class Refused:
    """A key of the dialect that this version cannot honour: an error, except at its neutral values.

    The last layer to write the key decides, so that a file can take back what its preset asks for.
    """

    reason: str
    neutral: tuple = (None, False)


@dataclass(frozen=True)
class Noted:
    """A key of the dialect that changes nothing here: accepted, and a note of the run says why.

    neutral: values that ask for nothing (a preset's own defaults), of which there is nothing to say.
    """

    reason: str
    neutral: tuple = ()


@dataclass(frozen=True)
class Compared:
    """A key of the dialect that says what the model's config.json says: kept, to be compared with it."""

    reason: str
    kind: Any


@dataclass(frozen=True)
class Half:
    """One of two keys that, where they say the same, say what one argument says; otherwise both are refused.

    other: the other key's last word.
    """

    argument: str
    other: str
    reason: str


Entry = Union[Target, Refused, Noted, Compared, Half]
Table = Mapping[str, Entry]


@dataclass(frozen=True)
class Setting:
    value: Any
    source: str
    written: str
    """The key as the user wrote it, for messages."""
    null: bool = False
    """The user wrote null, or the value only comes with another: it says nothing beside another name of it."""


@dataclass
class Layer:
    """The settings of one file, or of the command line."""

    settings: dict[str, Setting] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unused: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Why keys change nothing -> (place, key) of each of them."""
    refused: dict[str, Optional[ConfigError]] = field(default_factory=dict)
    """Key that cannot be honoured -> its error; None: it is written so that it asks for nothing."""
    shape: dict[str, Optional[list]] = field(default_factory=dict)
    """See BridgeArguments.shape; None: the key is written without a value."""
    halves: dict[str, Any] = field(default_factory=dict)
    """Value of each key that is one of two."""
    later_wins: bool = False
    """On a command line a repeated key replaces the former; in a file two different values are an error."""
    null_is_unset: bool = False
    """Primus's presets list keys without a value as null; elsewhere that is an error where a value is needed."""

    def set(self, argument: str, value: Any, source: str, written: str, null: bool = False) -> None:
        before = self.settings.get(argument)
        if null and before is not None and before.written != written and not self.later_wins:
            return
        if before is not None and not before.null and not self.later_wins and before.value != value:
            raise ConfigError(
                f"'{written}' contradicts '{before.written}' ({before.source}): both set {argument}, "
                f"to {value} and {before.value}; keep one",
                where=source,
            )
        self.settings[argument] = Setting(value, source, written, null)

    def all_notes(self) -> list[str]:
        """The notes, one a reason: keys that change nothing for the same reason stand together."""
        told = list(self.notes)
        for reason, keys in self.unused.items():
            names = [f"'{name}'" for _, name in keys]
            listed = f"{', '.join(names[:-1])} and {names[-1]} have" if len(names) > 1 else f"{names[0]} has"
            told.append(f"{keys[0][0]}: {listed} no effect here: {reason}")
        return told


def find(table: Table, name: str) -> Optional[Entry]:
    """The table's entry of a dotted name; keys with a * are patterns.

    A key that sets no argument is the same in every section.
    """
    if name in table:
        return table[name]
    section, _, key = name.rpartition(".")
    bare = table.get(key) if is_section(table, section) else None
    if bare is not None and not isinstance(bare, Target):
        return bare
    return next((entry for key, entry in table.items() if "*" in key and fnmatch.fnmatchcase(name, key)), None)


def is_section(table: Table, name: str) -> bool:
    return any(key.startswith(name + ".") for key in table)


def read_tree(tree: Located, table: Table, layer: Layer, prefix: str = "") -> None:
    """Put every key of a mapping into the layer; an unknown one is an error with a suggestion."""
    for key, node in tree.value.items():
        name = prefix + key
        if isinstance(node.value, dict) and is_section(table, name):
            read_tree(node, table, layer, name + ".")
            continue
        entry = find(table, name)
        if entry is None and not is_section(table, name):
            if isinstance(node.value, dict) and is_container_section(name):
                read_tree(node, table, layer, name + ".")
                continue
            entry = container_field(name)
        if entry is not None:
            apply(entry, name, node, layer)
        elif not is_section(table, name):
            raise unknown_key(table, name, node.where)
        elif node.value is not None:  # 'lora:' with nothing below it is an empty section
            raise ConfigError(f"'{name}' is a section: put its keys below it, got {plain(node)!r}", where=node.where)


def container_field(name: str) -> Optional[Entry]:
    """The entry of a field of Megatron-Bridge's ConfigContainer that a table has not; None for any other name."""
    if name == "_target_":
        return Refused(
            "Megatron-Bridge's whole ConfigContainer is printed to be read: give the file it was printed from, with "
            "the fields that you change",
            neutral=(),
        )
    unset = unset_values(name)
    if unset is None:
        return None
    from primus_bridge.config.primus import table

    bare = table().get(name.rpartition(".")[2])
    if bare is not None and not isinstance(bare, Target):
        return bare
    return Refused("it is a field of Megatron-Bridge's own, which this project does not set", neutral=unset)


def apply(entry: Entry, name: str, node: Located, layer: Layer) -> None:
    """One key and its value into the layer, by what the table says of it."""
    if isinstance(entry, Noted):
        if not _asks_for_nothing(entry, name, plain(node)):
            layer.unused.setdefault(entry.reason, []).append((node.where, name))
        return
    if isinstance(entry, Refused):
        layer.refused[name] = _refusal(entry, name, node)
        return
    if isinstance(entry, Compared):
        value = schema.check(name, Optional[entry.kind], node)
        layer.shape[name.rpartition(".")[2]] = None if value is None else [value, node.where]
        return
    if isinstance(entry, Half):
        _apply_half(entry, name, node, layer)
        return
    optional = schema.is_optional(entry.annotation)
    if layer.null_is_unset and optional and node.value == "null":
        node = Located(None, node.where)  # in quotes, it is no text either
    if layer.null_is_unset and node.value is None and (entry.null_says_nothing or not optional):
        return
    value = schema.check(name, entry.annotation, node)
    try:
        others = entry.also(value) if entry.also is not None else {}
        weak = entry.otherwise(value) if entry.otherwise is not None else {}
        value = entry.translate(value) if entry.translate is not None else value
        checked(entry.argument, value)
    except ValueError as error:
        join = " " if str(error).startswith("must be") else ": "
        raise ConfigError(f"'{name}'{join}{error}", where=node.where) from None
    layer.set(entry.argument, value, node.where, name, null=node.value is None or entry.yields)
    for argument, other in others.items():
        layer.set(argument, other, node.where, name)
    for argument, other in weak.items():
        before = layer.settings.get(argument)
        if before is None or before.null or before.written == name:
            layer.settings[argument] = Setting(other, node.where, name, null=True)


def _apply_half(entry: Half, name: str, node: Located, layer: Layer) -> None:
    value = schema.check(name, Optional[schema.fields()[entry.argument]], node)
    other = name.removesuffix(name.rpartition(".")[2]) + entry.other
    layer.halves[name] = value
    if value is None:
        layer.refused[name] = None
    elif layer.halves.get(other) == value:
        layer.refused |= {name: None, other: None}
        layer.set(entry.argument, value, node.where, name)
    else:
        layer.refused[name] = ConfigError(f"'{name}' cannot be {schema.shown(value)}: {entry.reason}", where=node.where)


def _refusal(entry: Refused, name: str, node: Located) -> Optional[ConfigError]:
    value = plain(node)
    if _asks_for_nothing(entry, name, value):
        return None
    words = (schema.typed(int(one) if isinstance(one, float) and one == 0 else one) for one in entry.neutral)
    neutral = " or ".join(dict.fromkeys(words))
    instead = f"leave it out, or write {neutral}" if neutral else "leave it out"
    return ConfigError(
        f"'{name}' cannot be {schema.shown(value)}: {entry.reason} ({instead})",
        where=node.where,
    )


def _asks_for_nothing(entry: Union[Refused, Noted], name: str, value: Any) -> bool:
    return _is_neutral(value, entry.neutral) or _is_neutral(value, unset_values(name) or ())


def _is_neutral(value: Any, neutral: tuple) -> bool:
    # False == 0 and True == 1 in Python, and 'true' is no neutral size
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def unknown_key(table: Table, name: str, where: str, hint: str = "") -> ConfigError:
    """The error for a key that no table knows: ``hint``, the section where the key does live, or the nearest word."""
    section, _, key = name.rpartition(".")
    inside = section + "." if section else ""
    siblings = {full[len(inside) :].split(".")[0] for full in table if full.startswith(inside) and "*" not in full}
    place = f"in section '{section}'" if section else "at the top level"
    hint = hint or did_you_mean(key, sorted(siblings))
    home = find(table, key)
    if section and isinstance(home, Target) and "." in home.argument:
        hint = f" - it belongs in section '{home.argument.split('.')[0]}'"
    return ConfigError(f"unknown key '{key}' {place}{hint}", where=where)


def build(layers: Iterable[Layer]) -> BridgeArguments:
    """Defaults, then the layers in their order; ``sources`` is filled for every argument.

    Raises ConfigError for a key that cannot be honoured and that no later layer takes back.
    """
    arguments = BridgeArguments()
    arguments.sources = dict.fromkeys(schema.fields(), "default")
    refused: dict[str, Optional[ConfigError]] = {}
    shape: dict[str, Optional[list]] = {}
    for layer in layers:
        refused = {name: error for name, error in refused.items() if name not in layer.refused} | layer.refused
        shape |= layer.shape
        arguments.notes.extend(take_back(arguments, layer.settings))
        for argument, setting in layer.settings.items():
            value = list(setting.value) if isinstance(setting.value, list) else setting.value
            if isinstance(value, str) and value.startswith("~"):
                value = os.path.expanduser(value)  # only paths begin so
            schema.put(arguments, argument, value, setting.source)
        keep_later(arguments, layer.settings)
        arguments.notes.extend(layer.all_notes())
    error = next((error for error in refused.values() if error is not None), None)
    if error is not None:
        raise error
    arguments.shape = {name: stated for name, stated in shape.items() if stated is not None}
    return arguments
