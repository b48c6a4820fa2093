"""SplitWriter: the samples of one split, counted and written; plain documents are cut into blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from primus_bridge.data.ledger import Counts
from primus_bridge.data.prepare import Samples
from primus_bridge.data.store import DatasetWriter, Origin


class SplitWriter:
    """Writes what rows became.

    block: None: conversations, a sample each. Else tokens a block of pretraining, whose documents are joined end to
    end (a block holds block + 1 tokens, of which the last is only a target there and the next block starts with it);
    with ``apart`` each document is cut by itself.
    """

    def __init__(self, folder: Path, split: str, unknown_id: int | None, block: int | None, apart: bool):
        self.split, self.unknown_id, self.block, self.apart = split, unknown_id, block, apart
        self.writer = DatasetWriter(folder, split)
        self.sources: list[int] = []
        """The source of each sample."""
        self.carry: list[tuple[np.ndarray, Origin]] = []
        """Documents that no block holds yet, the first one from where the last block ended."""
        self.carried = 0
        self.joined: Counts | None = None

    def add(self, samples: Samples, counts: Counts) -> None:
        """Write them, and add what was counted to ``counts`` (the source's)."""
        counts.add(samples.counts)
        if self.block is None:
            for ids, weights, origin in zip(samples.ids, samples.loss_weights, samples.origins, strict=True):
                self._write(ids, weights, origin, counts)
            return
        self.joined = counts
        for ids, origin in zip(samples.ids, samples.origins, strict=True):
            self.carry.append((ids, origin))
            self.carried += len(ids)
            if self.apart and len(ids) == 1:
                counts.drop("empty")  # one token is no target
                self.carry, self.carried = [], 0
            elif self.apart:
                self._cut(self.block, last=True)
            elif self.carried > 64 * self.block:
                self._cut(self.block, last=False)

    def end_source(self) -> None:
        """Blocks never span two sources: each token is counted with its own."""
        if self.block is not None and self.carry:
            self._cut(self.block, last=True)

    def close(self) -> None:
        self.writer.close()

    def _cut(self, block: int, last: bool) -> None:
        assert self.joined is not None
        stream, start = np.concatenate([ids for ids, _ in self.carry]), 0
        ends = np.cumsum([len(ids) for ids, _ in self.carry])
        while len(stream) - start > block or (last and len(stream) - start > 1):
            ids = stream[start : start + block + 1]
            weights = np.ones(len(ids), dtype=np.float32)
            weights[0] = 0
            self._write(ids, weights, self._origin(ends, start), self.joined)
            start += block
        self.carry = [] if last else [(stream[start:], self._origin(ends, start))]
        self.carried = 0 if last else len(stream) - start

    def _origin(self, ends: np.ndarray, start: int) -> Origin:
        """Of the document that position ``start`` of the carried ones lies in."""
        return self.carry[min(int(np.searchsorted(ends, start, side="right")), len(self.carry) - 1)][1]

    def _write(self, ids: np.ndarray, weights: np.ndarray, origin: Origin, counts: Counts) -> None:
        self.writer.add(ids, weights, origin)
        self.sources.append(origin.source)
        supervised = int(np.count_nonzero(weights))
        counts.samples += 1
        counts.tokens += len(ids)
        counts.supervised += supervised
        counts.masked += len(ids) - supervised
        if self.unknown_id is not None:
            counts.unknown_tokens += int(np.count_nonzero(ids == self.unknown_id))
