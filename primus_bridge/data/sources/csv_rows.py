"""CSV and TSV with a header row, by Python's csv module. Every value stays the text it is; an empty cell is ""."""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator
from pathlib import Path

from primus_bridge.data.sources.row import Row
from primus_bridge.data.sources.text_file import decoded, plain_suffix, raw_lines
from primus_bridge.errors import ConfigError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_CELL = 1 << 30
"""Characters. The csv module's own limit, for the whole process, is 128 Ki."""


class CSVFile:
    """Rows keyed by the header's names. Cells may hold line breaks in quotes; blank lines between rows are skipped.

    Raises ConfigError, with the line where the row begins, for a quote without its partner and for a row with more or
    fewer cells than the header.
    """

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return max(0, sum(1 for _ in self._records()) - 1)

    def rows(self, start: int) -> Generator[Row, None, int]:
        records = self._records()
        first_line, header = next(records, (1, []))
        for name in header:
            if header.count(name) > 1:
                raise ConfigError(
                    f"two columns are named '{name}'; the first row must name every column once",
                    where=f"{self.path}:{first_line}",
                )
        number = 0
        for line, cells in records:
            number += 1
            if number <= start:
                continue
            where = f"{self.path}:{line}"
            if len(cells) != len(header):
                names = ", ".join(header) if len(header) <= 8 else ", ".join(header[:8]) + ", ..."
                raise ConfigError(
                    f"row {number} has {len(cells)} cells, the header {len(header)} ({names}); quote a cell that holds "
                    "a delimiter or a line break",
                    where=where,
                )
            yield Row(dict(zip(header, cells, strict=True)), number, where)
        return max(0, start - number)

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(line where it begins, cells) of every record, the header first."""
        csv.field_size_limit(LONGEST_CELL)
        text = (decoded(raw, self.path, line) for line, raw in raw_lines(self.path))
        reader = csv.reader(text, delimiter=DELIMITERS[plain_suffix(self.path)], strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ConfigError(
                    f"malformed {plain_suffix(self.path)[1:].upper()}: {error}; check the quotes from this line on",
                    where=f"{self.path}:{line}",
                ) from None
            if cells:
                yield line, cells
