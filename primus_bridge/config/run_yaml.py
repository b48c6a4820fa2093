"""SAVE/run.yaml: the resolved arguments of a run, each with its source; itself a configuration to run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.merge import Layer
from primus_bridge.config.yaml_file import Located, load_yaml, locate, plain
from primus_bridge.errors import ConfigError, did_you_mean
from primus_bridge.files import write_text

HEADER = (
    "# The arguments of this run, as they were resolved; 'sources' says where each came from. 'source_digests' shows\n"
    "# which values were edited since: of those this file is the source.\n"
)
DIGESTS = "source_digests"
BROUGHT = re.compile(r" \(by [^()]*:\d+\)$")


def write_run_yaml(arguments: BridgeArguments, path: str | os.PathLike) -> None:
    """Write it whole or not at all (a temporary file, then a rename); the folder is made when missing.

    Raises ConfigError when the folder cannot be written.
    """
    path = Path(path)
    given = [name for name in schema.fields() if arguments.sources.get(name, "default") != "default"]
    digests = {name: _mark(schema.get(arguments, name)) for name in given}
    document = {**arguments.to_dict(), "sources": dict(arguments.sources), DIGESTS: digests}
    del document["shape"]  # the run's model agreed with it
    text = HEADER + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}; choose another --save", where=str(path)) from None


def digest(value: Any) -> str:
    """A few letters for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _mark(value: Any) -> str:
    return f"sha256:{digest(value)}"  # as YAML, bare hexadecimal may be a number


def believe(layer: Layer, record: dict[str, Any], known: dict[str, Any]) -> None:
    """The settings of a run.yaml with the sources that they had in the run that wrote it.

    What was left at the default, or followed other arguments, is so again. A value that was edited since, or was a
    default of another version, comes from the file. record, known: the file's ``sources`` and ``source_digests``, the
    latter empty where a version before them wrote it.
    """
    usual = BridgeArguments(stage="sft")  # of a file that names none
    left_out = set()
    for name in layer.settings.keys() & record.keys():
        setting, source = layer.settings[name], str(record[name])
        if source == "default":
            if setting.value == schema.get(usual, name):
                left_out.add(name)
        elif known.get(name, _mark(setting.value)) != _mark(setting.value):
            continue
        elif source.startswith("follows "):
            left_out.add(name)
        else:
            origin = BROUGHT.sub("", source)
            brought = setting.source if origin == setting.source else f"{origin} (by {setting.source})"
            layer.settings[name] = dataclasses.replace(setting, source=brought)
    if any(name.startswith("peft.") for name in layer.settings.keys() - left_out - {"peft.scheme"}):
        left_out.discard("peft.scheme")  # without it they would ask for an adapter
    for name in left_out:
        del layer.settings[name]


def read_run_yaml(path: str | os.PathLike) -> BridgeArguments:
    """The arguments with the sources they had in the run that wrote the file."""
    tree = load_yaml(path)
    sources = tree.value.pop("sources", Located({}, tree.where))
    tree.value.pop(DIGESTS, None)
    return from_dict(tree, {name: node.value for name, node in sources.value.items()})


def from_plain(values: dict, sources: dict[str, str], notes: list[str]) -> BridgeArguments:
    """The reverse of ``to_dict``, for arguments that travelled as JSON."""
    arguments = from_dict(locate(values, "arguments"), sources)
    arguments.notes = list(notes)
    return arguments


def from_dict(tree: Located, sources: dict[str, str]) -> BridgeArguments:
    """Nested sections with exactly the argument names -> BridgeArguments; types are checked."""
    arguments = BridgeArguments()
    arguments.sources = {name: sources.get(name, tree.where) for name in schema.fields()}
    arguments.shape = plain(tree.value.pop("shape", Located({}, tree.where)))
    for name, node in _leaves(tree, ""):
        if name not in schema.fields():
            raise ConfigError(f"unknown argument '{name}'{did_you_mean(name, schema.fields())}", where=node.where)
        value = schema.check(name, schema.fields()[name], node)
        schema.put(arguments, name, value, arguments.sources[name])
    return arguments


def _leaves(node: Located, prefix: str):
    for key, item in node.value.items():
        if isinstance(item.value, dict) and prefix + key not in schema.fields():
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item
