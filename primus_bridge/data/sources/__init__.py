"""Rows of a file (JSON, JSONL, CSV, Parquet, Arrow), of a folder of them, or from the hub, each with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from primus_bridge.data.cache import content_hash
from primus_bridge.data.sources import library
from primus_bridge.data.sources.column_files import ArrowFile, ParquetFile
from primus_bridge.data.sources.csv_rows import CSVFile
from primus_bridge.data.sources.folder import KINDS, data_files, files_of_split, kind_of, named_files, readable_files
from primus_bridge.data.sources.json_rows import JSONFile
from primus_bridge.data.sources.row import Reader, Row
from primus_bridge.data.sources.text_file import COMPRESSIONS, plain_suffix
from primus_bridge.errors import ConfigError
from primus_bridge.files import looks_like_path

__all__ = ["Row", "Source", "names_splits"]

READERS: dict[str, Callable[[Path], Reader]] = {
    "JSON": JSONFile,
    "CSV": CSVFile,
    "Parquet": ParquetFile,
    "Arrow": ArrowFile,
}


def names_splits(folder: Path) -> bool:
    """Whether the folder tells splits apart: by its files' names, or as a saved DatasetDict. Raises ConfigError when
    it holds no data files, or several kinds."""
    if library.is_saved(folder):
        return library.is_saved_splits(folder)
    return bool(named_files(data_files(folder), folder))


class Source:
    """An opened data set. Iterating gives its rows in file order; ``len`` their number; both respect max_samples.

    streaming: no length is known, files are not read before their rows are asked for, and of what is read only a part
    is held (of JSONL and CSV a row, of Parquet and Arrow a batch; the text of a JSON list is held whole); a hub data
    set is fetched while it is read. ``key`` names the option that gave ``path``, for messages.
    Raises ConfigError, while opening or iterating, that names the file and, for text, the line.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        max_samples: int | None = None,
        streaming: bool = False,
        key: str = "dataset.data_path",
    ):
        if max_samples is not None and max_samples < 1:
            raise ConfigError(f"dataset.max_samples must be at least 1, got {max_samples}", where="dataset.max_samples")
        self.path, self.split, self.max_samples, self.streaming, self.key = path, split, max_samples, streaming, key
        self.files: list[Path] = []
        self._hub = ""
        self._opened: list[Reader] | None = None
        place = Path(path).expanduser()
        if place.is_dir():
            if library.is_saved(place):
                dataset = library.load_saved(place, split)
                self._opened = [library.LoadedDataset(dataset, str(place))]
                self.files = [Path(file["filename"]) for file in dataset.cache_files]
            else:
                self.files = files_of_split(data_files(place), split, place)
        elif place.is_file():
            if kind_of(place) is None:
                suffixes = "".join(place.suffixes[-2 if place.suffix.lower() in COMPRESSIONS else -1 :])
                raise ConfigError(f"cannot read '{suffixes}' files; {key} takes {readable_files()}", where=path)
            if split != "train":
                raise ConfigError(f"split '{split}' is for folders and hub data sets; a file is read whole", where=path)
            self.files = [place]
        elif looks_like_path(path) or path.lower().endswith((*KINDS, *COMPRESSIONS)):
            raise ConfigError(f"no such file or folder (looked for {place.absolute()}); set {key}", where=path)
        elif not re.fullmatch(library.HUB_ID, path):
            raise ConfigError(f"neither a file, a folder, nor a hub id ('owner/name'); set {key}", where=path)
        else:
            reader, self._hub = library.load_hub(path, split, key, streaming)
            self._opened = [reader]

        for file in self.files:
            try:
                open(file, "rb").close()
            except OSError as error:
                raise ConfigError(f"cannot read it: {error.strerror}", where=str(file)) from error

    def fingerprint(self) -> str:
        """What the rows depend on: the content of the files, or the hub data set's own fingerprint.

        streaming: the files' sizes and times, since nothing may read them whole, or the commit on the hub.
        """
        if not self.files:
            return f"hub:{self.path}:{self.split}:{self._hub}"
        if self.streaming:
            return ",".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in self.files)
        return ",".join(f"{plain_suffix(path)}:{content_hash(path)}" for path in self.files)

    def __len__(self) -> int:
        if self.streaming:
            raise TypeError("a streamed source has no length")
        rows = sum(len(reader) for reader in self._readers())
        return rows if self.max_samples is None else min(rows, self.max_samples)

    def __iter__(self) -> Iterator[Row]:
        return self.rows()

    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from index ``start`` on; those before are skipped, unparsed where their places can be known."""
        rows = self._rows(start)
        return rows if self.max_samples is None else islice(rows, max(0, self.max_samples - start))

    def _rows(self, start: int) -> Iterator[Row]:
        for reader in self._readers():
            start = yield from reader.rows(start)

    def _readers(self) -> list[Reader]:
        if self._opened is None:
            self._opened = [READERS[str(kind_of(path))](path) for path in self.files]
        return self._opened
