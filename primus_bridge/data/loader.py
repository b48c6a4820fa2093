"""Loader: which sequences make the next optimizer step. Its state is an epoch and a sample index, at any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from primus_bridge.data.order import seeded_order
from primus_bridge.data.store import TokenizedDataset
from primus_bridge.data.stream import Stream
from primus_bridge.errors import ConfigError


@dataclass(frozen=True)
class SequenceRef:
    """One sequence of a data set, and its place in the run's order: the same number at any layout."""

    data: TokenizedDataset
    index: int
    ordinal: int


class Loader(Protocol):
    """The training sequences in order, epoch after epoch without a gap; a batch may hold the end of one and the
    beginning of the next. Nothing depends on the layout, nor on the size of the batches before."""

    def next(self, count: int) -> list[SequenceRef]:
        """The next ``count`` sequences, the same on every rank."""

    def state(self) -> dict[str, Any]:
        """``epoch`` and ``sample`` (sequences of it that were given), and what finds that place again; plain JSON."""

    def load(self, state: dict[str, Any]) -> str | None:
        """Continue after the sequences that were given when ``state`` was taken; a line for the user, if there is
        something to know. Raises ConfigError when that place is not in this data."""


def epoch_order(count: int, seed: int, *epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order of ``count`` sequences in an epoch (of a stream: and window), int64 [count]; by seed for ever."""
    return seeded_order(count, seed, *epoch) if shuffle else np.arange(count)


class WholeLoader:
    """Sequences of a data set that is there whole: each epoch is its own permutation of all of them."""

    def __init__(self, data: TokenizedDataset, seed: int, shuffle: bool = True):
        assert data.num_sequences > 0
        self.data, self.seed, self.shuffle = data, seed, shuffle
        self.epoch = self.sample = 0
        self._order = (-1, np.empty(0, dtype=np.int64))

    def next(self, count: int) -> list[SequenceRef]:
        out: list[SequenceRef] = []
        size = self.data.num_sequences
        while len(out) < count:
            if self._order[0] != self.epoch:
                self._order = (self.epoch, epoch_order(size, self.seed, self.epoch, shuffle=self.shuffle))
            part = self._order[1][self.sample : self.sample + count - len(out)]
            first = self.epoch * size + self.sample
            out += [SequenceRef(self.data, int(index), first + i) for i, index in enumerate(part)]
            self.sample += len(part)
            if self.sample == size:
                self.epoch, self.sample = self.epoch + 1, 0
        return out

    def epoch_inputs(self) -> np.ndarray:
        """Model inputs of each sequence of the first epoch, in its order, int64 [sequences]; of unpacked data."""
        assert not self.data.packed
        lengths = self.data.lengths - 1
        if self.data.pack_samples is not None:
            lengths = lengths[self.data.pack_samples]
        return lengths[epoch_order(len(lengths), self.seed, 0, shuffle=self.shuffle)]

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "sample": self.sample,
            "sequences": self.data.num_sequences,
            "digest": self.data.digest,
        }

    def load(self, state: dict[str, Any]) -> str | None:
        if "window" in state:
            raise ConfigError("the checkpoint is of a run with dataset.streaming: true; set it again to go on")
        now = self.data.num_sequences
        before = state.get("sequences", now)
        if before != now:
            self.epoch, self.sample = _next_epoch(state), 0
            return f"data      {now:,} sequences an epoch, {before:,} in the checkpoint: a new epoch begins"
        if state.get("digest") not in (None, self.data.digest):
            self.epoch, self.sample = _next_epoch(state), 0
            return "data      the sequences are not those of the checkpoint, though as many: a new epoch begins"
        self.epoch, self.sample = divmod(state["epoch"] * now + state["sample"], now)
        return None


class StreamLoader:
    """Sequences of a stream: windows in the order of the rows, each shuffled by itself."""

    def __init__(self, stream: Stream, seed: int, shuffle: bool = True):
        self.stream, self.seed, self.shuffle = stream, seed, shuffle
        self.given = 0
        """Sequences of the whole run so far."""
        self._passed: list[list[int]] = []  # windows that the last batch ended
        self._start(0, 0, 0, 0, stream.begin)

    def _start(self, epoch: int, sample: int, window: int, offset: int, rows: list[int]) -> None:
        self.epoch, self.sample = epoch, sample
        self.number, self.offset, self.rows = window, offset, rows
        self._window: tuple[TokenizedDataset, np.ndarray, list[int], bool] | None = None

    def _current(self) -> tuple[TokenizedDataset, np.ndarray, list[int], bool]:
        if self._window is None:
            window = self.stream.window(self.rows)
            order = epoch_order(window.data.num_sequences, self.seed, self.epoch, self.number, shuffle=self.shuffle)
            self._window = (window.data, order, window.following, window.last)
            self.stream.prefetch(self.stream.begin if window.last else window.following)
        return self._window

    def next(self, count: int) -> list[SequenceRef]:
        # a rank asks for a batch when all ranks have the one before: none looks for these any more
        while self._passed:
            self.stream.forget(self._passed.pop())
        out: list[SequenceRef] = []
        while len(out) < count:
            data, order, following, last = self._current()
            part = order[self.offset : self.offset + count - len(out)]
            out += [SequenceRef(data, int(index), self.given + i) for i, index in enumerate(part)]
            self.offset, self.sample, self.given = (
                self.offset + len(part),
                self.sample + len(part),
                self.given + len(part),
            )
            if self.offset == len(order):
                self._advance(following, last)
        return out

    def _advance(self, following: list[int], last: bool) -> None:
        if last and not self.sample:
            raise ConfigError("an epoch of the stream has no sample: the weights of dataset.sources are too small")
        self._passed.append(self.rows)
        if last:
            self._start(self.epoch + 1, 0, 0, 0, self.stream.begin)
        else:
            self._start(self.epoch, self.sample, self.number + 1, 0, following)

    def state(self) -> dict[str, Any]:
        return {
            "stream": self.stream.place,
            "epoch": self.epoch,
            "sample": self.sample,
            "window": self.number,
            "offset": self.offset,
            "rows": list(self.rows),
            "given": self.given,
        }

    def load(self, state: dict[str, Any]) -> str | None:
        if "window" not in state:
            raise ConfigError("the checkpoint is of a run without dataset.streaming; leave it out to go on")
        self.given = state["given"]
        if state["stream"] != self.stream.place:
            self._start(_next_epoch(state), 0, 0, 0, self.stream.begin)
            return "data      the stream's files or options are not those of the checkpoint: a new epoch begins"
        self._start(state["epoch"], state["sample"], state["window"], state["offset"], list(state["rows"]))
        return None


def _next_epoch(state: dict[str, Any]) -> int:
    """The first epoch of which nothing was given when ``state`` was taken."""
    return state["epoch"] + bool(state["sample"])


def open_loader(data: TokenizedDataset | Stream, seed: int, shuffle: bool) -> Loader:
    """The loader of a data set, or of a stream."""
    return StreamLoader(data, seed, shuffle) if isinstance(data, Stream) else WholeLoader(data, seed, shuffle)


def whole(data: TokenizedDataset, limit: int | None = None) -> Iterator[SequenceRef]:
    """Every sequence once, in the order of the data; the first ``limit`` of them."""
    for index in range(data.num_sequences if limit is None else min(limit, data.num_sequences)):
        yield SequenceRef(data, index, index)
