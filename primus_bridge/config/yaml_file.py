"""A YAML file read safely, every value with its file and line, and with the numbers a user means (1e-4 is one)."""

from __future__ import annotations

import numbers
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from primus_bridge.errors import ConfigError

# An alias bomb of a few lines expands to billions of nodes; no honest configuration has this many.
MAX_NODES = 100_000


@dataclass(frozen=True)
class Located:
    """A value and where it was written.

    value: a ``dict[str, Located]`` for a mapping, else a plain scalar or list.
    where: ``file:line``, or ``command line --lr``.
    raw: the text itself where it came without quotes or types (command line, environment), so that a
    ``str`` argument keeps it as typed.
    """

    value: Any
    where: str
    raw: Optional[str] = None


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers: ``1e-4`` is a float, ``010`` and ``1:30`` and dates are text."""


_OWN_TAGS = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def load_yaml(path: str | os.PathLike, shown: Optional[str] = None) -> Located:
    """The file as a tree of Located values; an empty file is an empty mapping.

    shown: the name in messages and sources; default the path as given. Raises ConfigError (file:line) for a missing
    or malformed file, a duplicate key, a tag (no code or object is ever built), or a top level that is no mapping.
    """
    shown = shown or os.path.normpath(str(path))
    text = _read(Path(path), shown)
    try:
        loader = Loader(text)
    except yaml.YAMLError as error:  # a control character
        raise ConfigError(f"not a text file that YAML allows: {error}", where=shown) from None
    try:
        root = loader.get_single_node()
        if root is None:
            return Located({}, f"{shown}:1")
        tree = _Walk(loader, shown).walk(root, ())
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"malformed YAML: {_reason(error)}", where=_mark(shown, error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"malformed YAML: {error}", where=shown) from None
    except RecursionError:
        raise ConfigError("malformed YAML: nested too deeply", where=shown) from None
    finally:
        loader.dispose()
    if not isinstance(tree.value, dict):
        raise ConfigError("the file must hold 'key: value' lines at its top level", where=tree.where)
    return tree


def parse_scalar(text: str) -> Any:
    """What YAML makes of one unquoted word: ``1e-4`` -> 0.0001, ``true`` -> True, ``null`` -> None, else text."""
    resolver = Loader("")
    try:
        tag = resolver.resolve(yaml.ScalarNode, text, (True, False))
        if tag == "tag:yaml.org,2002:null":
            return None
        if tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool"):
            return resolver.construct_object(yaml.ScalarNode(tag, text))
        return text
    finally:
        resolver.dispose()


def parse_text(text: str) -> Any:
    """What YAML makes of a whole value on a command line, ``{instruction: question}``; None when it is no YAML."""
    try:
        return yaml.load(text, Loader)  # a SafeLoader: no object is ever built
    except yaml.YAMLError:
        return None


def shipped_table(name: str) -> Any:
    """What a YAML file beside this one holds: of this package, so without places and checks, by the fast loader."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(Path(__file__).with_name(name).read_text(encoding="utf-8"), Loader=loader)


class _Walk:
    def __init__(self, loader: Loader, shown: str):
        self.loader, self.shown, self.nodes = loader, shown, 0

    def walk(self, node: yaml.Node, above: tuple) -> Located:
        where = f"{self.shown}:{node.start_mark.line + 1}"
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ConfigError(f"more than {MAX_NODES} values (anchors that multiply?)", where=where)
        if id(node) in above:
            raise ConfigError("an anchor contains itself", where=where)
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return Located(self.mapping(node, above), where)
        if isinstance(node, yaml.SequenceNode):
            self.untagged(node, "tag:yaml.org,2002:seq")
            return Located([plain(self.walk(item, above)) for item in node.value], where)
        return Located(self.loader.construct_object(node), where)

    def mapping(self, node: yaml.MappingNode, above: tuple) -> dict[str, Located]:
        self.untagged(node, "tag:yaml.org,2002:map")
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError("a key must be one word", where=f"{self.shown}:{line}")
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in first_line:
                raise ConfigError(
                    f"duplicate key '{key.value}' (first in line {first_line[key.value]})", where=f"{self.shown}:{line}"
                )
            first_line[key.value] = line
        self.loader.flatten_mapping(node)  # '<<': merged keys come first, so the mapping's own win below
        tree: dict[str, Located] = {}
        for key, value in node.value:
            located = self.walk(value, above)
            # the key's line, not the value's: a block below its key starts a line later
            tree[key.value] = Located(located.value, f"{self.shown}:{key.start_mark.line + 1}")
        return tree

    def untagged(self, node: yaml.Node, usual: str) -> None:
        if node.tag != usual:
            raise ConfigError(f"the tag {node.tag} is not allowed", where=f"{self.shown}:{node.start_mark.line + 1}")


def plain(node: Any) -> Any:
    """The value without its places: nested dicts and lists."""
    value = node.value if isinstance(node, Located) else node
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def locate(value: Any, where: str) -> Located:
    """The reverse of ``plain``: every value with the one place that is known, as YAML would have it (``native``)."""
    if isinstance(value, dict):
        return Located({str(key): locate(item, where) for key, item in value.items()}, where)
    return Located(native(value), where)


def native(value: Any) -> Any:
    """A path as text, a tuple as a list, and a number of another library's (NumPy's) as Python's, at any depth."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {key: native(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [native(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _read(path: Path, shown: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file", where=shown) from None
    except IsADirectoryError:
        raise ConfigError("this is a folder; a YAML file is needed", where=shown) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not a UTF-8 text file ({error.reason} at byte {error.start})", where=shown) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=shown) from None


def _reason(error: yaml.MarkedYAMLError) -> str:
    parts = [part for part in (error.context, error.problem) if part]
    return ", ".join(parts) or "unreadable"


def _mark(shown: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f"{shown}:{mark.line + 1}" if mark else shown
