"""Data sets of the ``datasets`` library: from the hub, streamed or not, and folders of ``save_to_disk``."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from primus_bridge.data.sources.row import Row
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB_ID = r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?"
"""name, owner/name, or owner/name:configuration."""

BATCH_ROWS = 1000


class LoadedDataset:
    """Rows of a ``datasets.Dataset``, which lies memory-mapped on disk."""

    def __init__(self, dataset: Dataset, where: str):
        self.dataset, self.where = dataset, where

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, start: int) -> Generator[Row, None, int]:
        number = start
        for begin in range(start, len(self), BATCH_ROWS):
            columns = self.dataset[begin : begin + BATCH_ROWS]
            names = list(columns)
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield Row(dict(zip(names, values, strict=True)), number, self.where)
        return max(0, start - len(self))


class StreamedDataset:
    """Rows of a ``datasets.IterableDataset``: of unknown number, fetched while they are read."""

    def __init__(self, dataset: IterableDataset, where: str):
        self.dataset, self.where = dataset, where

    def __len__(self) -> int:
        raise TypeError("a streamed data set has no length")

    def rows(self, start: int) -> Generator[Row, None, int]:
        number = start
        try:
            for data in self.dataset.skip(start):
                number += 1
                yield Row(data, number, self.where)
        except ConfigError:
            raise
        except Exception as error:  # the network, or a broken file: each its own type
            raise ConfigError(
                f"the stream stopped after row {number}: {_first_line(error)}; try again, or set dataset.streaming: "
                "false",
                where=self.where,
            ) from error
        return 0


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    return is_saved_splits(folder) or ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file())


def is_saved_splits(folder: Path) -> bool:
    """Whether ``DatasetDict.save_to_disk`` wrote the folder."""
    return (folder / "dataset_dict.json").is_file()


def load_saved(folder: Path, split: str) -> Dataset:
    """The data set of a folder of save_to_disk; of a DatasetDict the one named ``split``."""
    import datasets

    try:
        known = ["train"]
        if is_saved_splits(folder):
            known = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            dataset = datasets.load_from_disk(folder / split) if split in known else None
        else:
            dataset = datasets.load_from_disk(folder)
            known += [str(dataset.split)] if dataset.split else []
    except Exception as error:  # a missing or broken file of the folder: each its own type
        raise ConfigError(
            f"not a readable folder of save_to_disk: {_first_line(error)}; save it again", where=str(folder)
        ) from error
    if split not in known or dataset is None:
        raise ConfigError(
            f"no split '{split}' in the folder (found: {', '.join(known)}); set dataset.split", where=str(folder)
        )
    return dataset


def load_hub(name: str, split: str, key: str, streaming: bool) -> tuple[LoadedDataset | StreamedDataset, str]:
    """(reader, fingerprint) of a hub data set."""
    import datasets

    datasets.disable_progress_bars()
    repository, _, configuration = name.partition(":")
    try:
        revision = _ask_hub(repository)
        dataset = datasets.load_dataset(
            repository, configuration or None, split=split, streaming=streaming, revision=revision or None
        )
    except Exception as error:  # network, access, unknown split, ...: each its own type
        raise ConfigError(
            f"no such file or folder here, and it cannot be loaded from the hub either (split '{split}'): "
            f"{_first_line(error)}; set {key}",
            where=name,
        ) from error
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedDataset(dataset, name), revision
    return LoadedDataset(dataset, name), dataset._fingerprint


def _ask_hub(name: str) -> str:
    """The data set's commit on the hub, asked once: ``datasets`` itself asks an unreachable hub for half a minute.

    Raises the hub's own error when it refuses. Without an answer, "", and only what is cached is loaded.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().dataset_info(name, timeout=20).sha or ""
    except HfHubHTTPError:
        raise
    except Exception:  # no network, or offline by choice: each HTTP library has its own types
        datasets.config.HF_HUB_OFFLINE = True
        return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
