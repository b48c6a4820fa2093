"""Rows from a JSON, JSONL or Parquet file, a folder of them, or a hub id, each with the place it came from.

Parquet and hub data are read by the ``datasets`` library. JSON is parsed here: the library's reader turns text that
looks like a date into a timestamp, and names neither file nor line of a malformed row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from primus_bridge.data.cache import cache_root, content_hash
from primus_bridge.errors import ConfigError
from primus_bridge.files import looks_like_path

JSON_SUFFIXES = (".json",)
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = JSON_SUFFIXES + JSONL_SUFFIXES + PARQUET_SUFFIXES

# words in a file's name that say which split it holds, as the datasets library reads them
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class Row(NamedTuple):
    """One row: its values, and where a user finds it."""

    data: dict[str, Any]
    number: int
    """Counted from 1, within its file (or hub split)."""
    where: str
    """``file:line``, ``file`` for Parquet, or the hub id."""


class JSONFile:
    """A JSON list of objects, or JSONL. Blank lines are skipped; CRLF and a byte-order mark are fine."""

    def __init__(self, path: Path):
        self.path = path
        self._list: list[tuple[dict[str, Any], int]] | None = None
        if path.suffix.lower() in JSON_SUFFIXES and _first_character(path) == "[":
            self._list = list(_parse_list(path))

    def __len__(self) -> int:
        if self._list is not None:
            return len(self._list)
        with open(self.path, "rb") as file:
            return sum(1 for line in file if line.strip(b" \t\r\n\xef\xbb\xbf"))

    def __iter__(self) -> Iterator[Row]:
        pairs = self._list if self._list is not None else _parse_lines(self.path)
        for number, (data, line) in enumerate(pairs, start=1):
            where = f"{self.path}:{line}"
            if not isinstance(data, dict):
                raise ConfigError(
                    f"row {number} must be an object with named columns, found {_kind(data)}", where=where
                )
            yield Row(data, number, where)


class ArrowTable:
    """Rows of a ``datasets.Dataset``."""

    def __init__(self, dataset, where: str):
        self.dataset, self.where = dataset, where

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Row]:
        number = 0
        for columns in self.dataset.iter(batch_size=1000):
            names = list(columns)
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield Row(dict(zip(names, values, strict=True)), number, self.where)


class Source:
    """An opened data set. Iterating gives its rows in file order; ``len`` their number; both respect max_samples.

    Raises ConfigError, while opening or iterating, that names the file and, for JSON, the line.
    """

    def __init__(
        self, path: str, *, split: str = "train", max_samples: int | None = None, key: str = "dataset.data_path"
    ):
        if max_samples is not None and max_samples < 1:
            raise ConfigError(f"dataset.max_samples must be at least 1, got {max_samples}", where="dataset.max_samples")
        self.path, self.split, self.max_samples, self.key = path, split, max_samples, key
        place = Path(path).expanduser()
        self.files: list[Path] = []
        self._hub = None
        self._tables: list[JSONFile | ArrowTable] | None = None
        if place.is_dir():
            self.files = _files_of_split(_data_files(place), split, place)
        elif place.is_file():
            if place.suffix.lower() not in SUFFIXES:
                raise ConfigError(f"cannot read '{place.suffix}' files; {key} takes " + ", ".join(SUFFIXES), where=path)
            if split != "train":
                raise ConfigError(f"split '{split}' is for folders and hub data sets; a file is read whole", where=path)
            self.files = [place]
        elif looks_like_path(path) or path.lower().endswith(SUFFIXES):
            raise ConfigError(f"no such file or folder (looked for {place.absolute()}); set {key}", where=path)
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            raise ConfigError(f"neither a file, a folder, nor a hub id ('owner/name'); set {key}", where=path)
        else:
            self._hub = _load_hub(path, split, key)

        for file in self.files:
            try:
                open(file, "rb").close()
            except OSError as error:
                raise ConfigError(f"cannot read it: {error.strerror}", where=str(file)) from error

    def fingerprint(self) -> str:
        """What the rows depend on: the content of the files, or the hub data set's own fingerprint."""
        if self._hub is not None:
            return f"hub:{self.path}:{self.split}:{self._hub._fingerprint}"
        return ",".join(f"{path.suffix.lower()}:{content_hash(path)}" for path in self.files)

    def tables(self) -> list[JSONFile | ArrowTable]:
        if self._tables is None:
            if self._hub is not None:
                self._tables = [ArrowTable(self._hub, self.path)]
            else:
                self._tables = [
                    _load_parquet(path) if path.suffix.lower() in PARQUET_SUFFIXES else JSONFile(path)
                    for path in self.files
                ]
        return self._tables

    def __len__(self) -> int:
        rows = sum(len(table) for table in self.tables())
        return rows if self.max_samples is None else min(rows, self.max_samples)

    def __iter__(self) -> Iterator[Row]:
        left = len(self)
        for table in self.tables():
            for row in table:
                if left == 0:
                    return
                left -= 1
                yield row


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _utf8(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ConfigError(
            f"invalid UTF-8 (byte 0x{raw[error.start]:02x}); convert the file, for example with "
            "'iconv -f latin1 -t utf-8'",
            where=f"{path}:{line}",
        ) from None


def _first_character(path: Path) -> str:
    with open(path, "rb") as file:
        for line in file:
            stripped = line.removeprefix(b"\xef\xbb\xbf").strip()
            if stripped:
                return chr(stripped[0])
    return ""


def _parse_lines(path: Path) -> Iterator[tuple[Any, int]]:
    """(value, line number) of every non-blank line."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            text = _utf8(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, path, line).strip(" \t\r\n")
            if not text:
                continue
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                hint = "one object a line (JSONL)"
                if path.suffix.lower() in JSON_SUFFIXES:
                    hint = "a list of objects, or one object a line"
                reason = getattr(error, "msg", "nested too deeply")
                column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                raise ConfigError(
                    f"malformed JSON: {reason}{column}; expected {hint}", where=f"{path}:{line}"
                ) from None
            yield value, line


def _parse_list(path: Path) -> Iterator[tuple[Any, int]]:
    """(value, line where it starts) of every element of a JSON list."""
    text = _utf8(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), path, 1)
    decoder, ink = json.JSONDecoder(), re.compile(r"[^ \t\r\n]")

    def after_blanks(at: int) -> int:
        found = ink.search(text, at)
        return found.start() if found else len(text)

    position = after_blanks(0) + 1  # past the '['
    line, counted = 1, 0

    def malformed(reason: str, at: int) -> ConfigError:
        return ConfigError(
            f"malformed JSON: {reason}; expected a list of objects", where=f"{path}:{text.count(chr(10), 0, at) + 1}"
        )

    position = after_blanks(position)
    while text[position : position + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise malformed(error.msg, error.pos) from None
        except RecursionError:
            raise malformed("nested too deeply", position) from None
        line += text.count("\n", counted, position)
        counted = position
        yield value, line
        position = after_blanks(end)
        if text[position : position + 1] == ",":
            position = after_blanks(position + 1)
        elif text[position : position + 1] != "]":
            raise malformed("Expecting ',' or ']' after a row", min(position, len(text)))
    rest = after_blanks(position + 1)
    if rest != len(text):
        raise malformed("text after the list", rest)


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, sub-folders included, in the order of their names; hidden ones left out."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    if not files:
        raise ConfigError("the folder holds no data file (looked for *" + ", *".join(SUFFIXES) + ")", where=str(folder))
    kinds = {"parquet" if path.suffix.lower() in PARQUET_SUFFIXES else "json" for path in files}
    if len(kinds) > 1:
        raise ConfigError(
            "the folder mixes Parquet and JSON files; name one file, or a folder with one kind", where=str(folder)
        )
    return files


def _files_of_split(files: list[Path], split: str, folder: Path) -> list[Path]:
    """The files whose names say ``split``; all of them when no name says any split and 'train' is asked for."""
    named: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[^a-z]+", str(path.relative_to(folder).with_suffix("")).lower())
        for name, synonyms in SPLIT_WORDS.items():
            if any(word in synonyms for word in words):
                named.setdefault(name, []).append(path)
                break
    if split in named:
        return named[split]
    if split == "train" and not named:
        return files
    found = ", ".join(sorted(named)) or "no file named after a split"
    raise ConfigError(
        f"no files of split '{split}' in the folder (found: {found}); set dataset.split", where=str(folder)
    )


def _quiet_progress() -> None:
    import datasets

    datasets.disable_progress_bars()


def _load_parquet(path: Path) -> ArrowTable:
    import datasets

    _quiet_progress()
    try:
        table = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", cache_dir=str(cache_root() / "arrow")
        )
    except Exception as error:  # datasets wraps Arrow's errors in several types
        cause = error.__cause__ or error
        raise ConfigError(f"not a readable Parquet file: {str(cause).splitlines()[0]}", where=str(path)) from error
    return ArrowTable(table, str(path))


def _ask_hub(name: str) -> None:
    """Whether the hub knows the data set, asked once: ``datasets`` itself asks an unreachable hub for half a minute.

    Raises the hub's own error when it refuses. Without an answer only what is cached is loaded.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=20)
    except HfHubHTTPError:
        raise
    except Exception:  # no network, or offline by choice: each HTTP library has its own types
        datasets.config.HF_HUB_OFFLINE = True


def _load_hub(name: str, split: str, key: str):
    import datasets

    _quiet_progress()
    try:
        _ask_hub(name)
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, access, unknown split, ...: each its own type
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"no such file or folder here, and it cannot be loaded from the hub either (split '{split}'): {first}; "
            f"set {key}",
            where=name,
        ) from error
    return dataset
