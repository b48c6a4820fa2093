"""Parquet and Arrow files, read batch by batch with pyarrow: nothing is copied into a cache, no file is held whole."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from primus_bridge.data.sources.row import Row
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH_ROWS = 1000


class ParquetFile:
    """Read by row group; groups before the start are not read."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        with self._opened() as file:
            return file.metadata.num_rows

    def rows(self, start: int) -> Generator[Row, None, int]:
        first = 0
        with self._opened() as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first + rows > start:
                    batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group])
                    yield from _rows(batches, first, start, self.path)
                first += rows
        return max(0, start - first)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[pyarrow.parquet.ParquetFile]:
        import pyarrow.parquet

        with _readable("Parquet", self.path), pyarrow.parquet.ParquetFile(self.path) as file:
            yield file


class ArrowFile:
    """An IPC stream (what the ``datasets`` library writes) or an IPC file, memory-mapped."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        with self._batches() as batches:
            return sum(batch.num_rows for batch in batches)

    def rows(self, start: int) -> Generator[Row, None, int]:
        first = 0
        with self._batches() as batches:
            for batch in batches:
                if first + batch.num_rows > start:
                    yield from _rows(iter([batch]), first, start, self.path)
                first += batch.num_rows
        return max(0, start - first)

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Iterator[pyarrow.RecordBatch]]:
        import pyarrow

        with _readable("Arrow", self.path), pyarrow.memory_map(str(self.path)) as file:
            is_file_format = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file_format:
                with pyarrow.ipc.open_file(file) as reader:
                    yield (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                with pyarrow.ipc.open_stream(file) as reader:
                    yield iter(reader)


def _rows(batches: Iterator[pyarrow.RecordBatch], first: int, start: int, path: Path) -> Iterator[Row]:
    """Rows from index ``start`` on of neighbouring batches, the first of which begins with row index ``first``."""
    for batch in batches:
        skipped = min(max(0, start - first), batch.num_rows)
        # in slices: one record batch may be a whole file
        for begin in range(skipped, batch.num_rows, BATCH_ROWS):
            values = batch.slice(begin, BATCH_ROWS).to_pylist()
            for number, data in enumerate(values, start=first + begin + 1):
                yield Row(data, number, str(path))
        first += batch.num_rows


@contextlib.contextmanager
def _readable(kind: str, path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"not a readable {kind} file: {reason}; make or download it again", where=str(path)
        ) from error
