"""The data files of a folder, and which of them a split names."""

from __future__ import annotations

import re
from pathlib import Path

from primus_bridge.data.sources import csv_rows, json_rows
from primus_bridge.data.sources.text_file import COMPRESSIONS, plain_suffix
from primus_bridge.errors import ConfigError

KINDS = {
    **dict.fromkeys(json_rows.SUFFIXES, "JSON"),
    **dict.fromkeys(csv_rows.DELIMITERS, "CSV"),
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}

# what the datasets library writes beside its data
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")

# words in a file's name that say which split it holds, as the datasets library reads them
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def kind_of(path: Path) -> str | None:
    """JSON, CSV, Parquet or Arrow by the file's name; None for another. Only text is read compressed."""
    kind = KINDS.get(plain_suffix(path))
    return None if kind in ("Parquet", "Arrow") and path.suffix.lower() in COMPRESSIONS else kind


def readable_files() -> str:
    """``.json, .jsonl, ...``: what kind_of knows, for messages."""
    return ", ".join(KINDS) + ", and text also with " + " or ".join(COMPRESSIONS)


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder, sub-folders included, in the order of their names; hidden ones left out."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if kind_of(path)
        and path.is_file()
        and path.name not in DESCRIPTIONS
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    if not files:
        raise ConfigError(f"the folder holds no data file (looked for {readable_files()})", where=str(folder))
    kinds = sorted({str(kind_of(path)) for path in files})
    if len(kinds) > 1:
        raise ConfigError(
            f"the folder mixes {' and '.join(kinds)} files; name one file, or a folder with one kind", where=str(folder)
        )
    return files


def named_files(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """split -> the files whose names, or sub-folders' names, say it; those that say none are left out."""
    named: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[^a-z]+", str(path.relative_to(folder).with_suffix("")).lower())
        for name, synonyms in SPLIT_WORDS.items():
            if any(word in synonyms for word in words):
                named.setdefault(name, []).append(path)
                break
    return named


def files_of_split(files: list[Path], split: str, folder: Path) -> list[Path]:
    """The files whose names say ``split``; all of them when no name says any split and 'train' is asked for."""
    named = named_files(files, folder)
    if split in named:
        return named[split]
    if split == "train" and not named:
        return files
    found = ", ".join(sorted(named)) or "no file named after a split"
    raise ConfigError(
        f"no files of split '{split}' in the folder (found: {found}); set dataset.split", where=str(folder)
    )
