"""Streaming: windows of rows, tokenised and packed one after the other while training goes on.

A window is a folder of the cache as a whole data set is, so any number of ranks share it, and a resumed run finds it
again. Which rows make a window depends on nothing but the sources: every epoch has the same ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from primus_bridge.data.cache import cached_folder, drop_folder
from primus_bridge.data.ledger import Ledger
from primus_bridge.data.pipeline import Opened, Pipeline, identity
from primus_bridge.data.prepare import PlacedRow, prepared_chunks
from primus_bridge.data.store import TokenizedDataset
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from primus_bridge.data.dataset import DataBundle
    from primus_bridge.data.sources import Row

ENDED = -1
"""In place of a row: this source has no more."""


@dataclass
class Window:
    """A window's samples, and where the next one begins."""

    data: TokenizedDataset
    following: list[int]
    """The first row of the next window in each source; ENDED where there is none."""
    ledger: Ledger
    largest_id: int

    @property
    def last(self) -> bool:
        """Whether the epoch ends with it."""
        return all(row == ENDED for row in self.following)


class Stream:
    """The windows of the training sources: streaming_window rows each, as many of one source as of another."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.train = [opened for opened in pipeline.sources if opened.split == "train"]
        self.key = identity(pipeline.arguments, pipeline.tokenizer, self.train)
        self.place = identity(pipeline.arguments, pipeline.tokenizer, self.train, exact=False)
        """The same wherever a place in the rows means the same samples; for the state of a loader."""
        self.begin = [0] * len(self.train)
        self.ledger = pipeline.ledger()
        """Of what has been read so far, and of the validation set."""
        self.check_largest_id: Callable[[int], None] = lambda largest_id: None
        self._counted: set[tuple[int, ...]] = set()
        self._open: dict[int, tuple[int, Iterator[Row]]] = {}  # source -> (next row, rows from there on)
        self._building = threading.Lock()

    def window(self, begin: list[int]) -> Window:
        """The window that starts at these rows; built when no rank of this node has yet. Raises ConfigError."""
        folder = self._folder(begin)
        meta = json.loads((folder / "meta.json").read_text())
        window = Window(
            TokenizedDataset.open(folder, "train"),
            meta["following"],
            Ledger.from_dict(meta["ledger"]),
            meta["largest_id"],
        )
        self.check_largest_id(window.largest_id)
        if tuple(begin) not in self._counted:  # in a later epoch it is no new data
            self._counted.add(tuple(begin))
            self.ledger.add(window.ledger)
            self.pipeline.check_lost(self.ledger, "train")
        return window

    def prefetch(self, begin: list[int]) -> None:
        """Build that window in a thread; by the first rank of a node only. An error is raised when it is asked for."""
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            threading.Thread(target=self._prefetch, args=(begin,), daemon=True, name="next window").start()

    def _prefetch(self, begin: list[int]) -> None:
        try:
            self._folder(begin)
        except ConfigError:
            return  # the rank that needs the window meets it again, and all ranks do

    def forget(self, begin: list[int]) -> None:
        """Remove that window from the cache, once every rank has passed it; the first one stays for the next start.

        Without it a stream would end up whole on the disk.
        """
        if begin != self.begin and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            drop_folder(self._name(begin))

    def _name(self, begin: list[int]) -> str:
        return hashlib.sha256(f"{self.key}|{begin}".encode()).hexdigest()

    def _folder(self, begin: list[int]) -> Path:
        with self._building:
            return cached_folder(self._name(begin), lambda folder: self._build(folder, begin))

    def _build(self, folder: Path, begin: list[int]) -> None:
        from primus_bridge.data.dataset import save_epoch

        pipeline = self.pipeline
        ledger = pipeline.ledger(range(len(self.train)))
        writer = pipeline.writer(folder, "train")
        following = list(begin)
        going = [number for number, row in enumerate(begin) if row != ENDED]
        share = max(1, pipeline.arguments.dataset.streaming_window // len(going))
        for number in going:
            rows, ended = self._rows(number, begin[number], share)
            following[number] = ENDED if ended else begin[number] + len(rows)
            placed = [PlacedRow(row, begin[number] + i, "train") for i, row in enumerate(rows)]
            counts = ledger.sources[number].counts["train"]
            for chunk in prepared_chunks(placed, pipeline.preparation(number), num_workers=1):
                writer.add(chunk["train"], counts)
            writer.end_source()
        writer.close()
        save_epoch(folder, "train", writer, pipeline, ledger, window=begin)
        meta = {"ledger": ledger.to_dict(), "largest_id": writer.writer.largest_id, "following": following}
        (folder / "meta.json").write_text(json.dumps(meta))

    def _rows(self, number: int, start: int, count: int) -> tuple[list[Row], bool]:
        """(rows start..start + count of a source, whether it ends with them)"""
        at, rows = self._open.pop(number, (-1, iter(())))
        if at != start:
            rows = self._from(self.train[number], start)
        found = []
        for row in rows:
            found.append(row)
            if len(found) > count:
                break
        if len(found) <= count:
            return found, True
        # one row beyond the window tells whether there is another one
        self._open[number] = (start + count, _chained(found.pop(), rows))
        return found, False

    @staticmethod
    def _from(opened: Opened, start: int) -> Iterator[Row]:
        if not opened.gathers:
            return iter(opened.source.rows(start))
        rows = iter(opened.rows)
        for _ in range(start):
            next(rows, None)
        return rows


def _chained(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def open_stream(pipeline: Pipeline) -> DataBundle:
    """The training sources as a Stream, whose first window is read now; the validation set whole."""
    from primus_bridge.data.dataset import DataBundle, build_validation

    stream = Stream(pipeline)
    first = stream.window(stream.begin)
    if not stream.ledger.train.samples:
        pipeline.check_left(stream.ledger, "train")
    validation, largest_id = None, first.largest_id
    if any(opened.split == "validation" for opened in pipeline.sources):
        validation, counted, largest = build_validation(pipeline)
        for mine, told in zip(stream.ledger.sources[len(stream.train) :], counted.sources, strict=True):
            mine.counts = told.counts
        largest_id = max(largest_id, largest)
    return DataBundle(stream, validation, stream.ledger, largest_id)
