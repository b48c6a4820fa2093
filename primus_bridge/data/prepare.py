"""From rows to samples: convert, render, tokenise and cut to length, in chunks, in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from primus_bridge.data.formats import CONVERSATIONS, RowError, text
from primus_bridge.data.ledger import SplitLedger
from primus_bridge.data.sources import Row
from primus_bridge.data.store import DatasetWriter
from primus_bridge.data.templates import Rendered, Template
from primus_bridge.data.tokenize import Encoder

CHUNK_ROWS = 512


class Prepared(NamedTuple):
    """What one row became. ``dropped`` is None or a reason of the ledger; then ids and loss_weights are empty."""

    ids: np.ndarray
    loss_weights: np.ndarray
    dropped: str | None = None
    truncated_tokens: int = 0
    skipped_turns: int = 0


NOTHING = np.empty(0, dtype=np.int32)


@dataclass
class Preparation:
    """The way of a row to a sample. ``template`` is None for plain documents (pretraining)."""

    data_format: str
    template: Template | None
    encoder: Encoder
    seq_length: int
    truncation: str

    def __call__(self, rows: Sequence[Row]) -> list[Prepared]:
        """One Prepared a row, in order. Raises ConfigError naming the file, row and column of a row that is wrong."""
        if self.template is None:
            return self._documents(rows)
        convert, rendered, skipped = CONVERSATIONS[self.data_format], [], []
        for row in rows:
            try:
                conversation = convert(row.data)
                rendered.append(self.template.render(conversation.messages))
            except RowError as error:
                raise error.at(row) from None
            skipped.append(conversation.skipped_turns)
        encoded = self.encoder.encode_rendered(rendered)
        return [
            self._fitted(sample, ids, weights)._replace(skipped_turns=turns)
            for sample, (ids, weights), turns in zip(rendered, encoded, skipped, strict=True)
        ]

    def _documents(self, rows: Sequence[Row]) -> list[Prepared]:
        documents = []
        for row in rows:
            try:
                documents.append(text(row.data))
            except RowError as error:
                raise error.at(row) from None
        encoded = self.encoder.encode_documents(documents)
        return [
            Prepared(ids, NOTHING) if document else Prepared(NOTHING, NOTHING, "empty")
            for document, ids in zip(documents, encoded, strict=True)
        ]

    def _fitted(self, sample: Rendered, ids: np.ndarray, weights: np.ndarray) -> Prepared:
        """Cuts a sample that is too long from the left, or drops it.

        Kept are BOS and the system message when the last answer still fits beside them, else BOS alone, and the newest
        tokens. The last answer is never cut: a sample whose last answer alone does not fit is dropped. An answer that
        loses its beginning or its prompt is context, not a target.
        """
        if not weights.any():
            return Prepared(NOTHING, NOTHING, "no_supervised")
        if len(ids) <= self.seq_length:
            return Prepared(ids, weights)
        if self.truncation == "drop":
            return Prepared(NOTHING, NOTHING, "too_long")
        unsupervised = np.flatnonzero(weights == 0)
        last_target = int(np.flatnonzero(weights)[-1])
        answer_start = int(unsupervised[np.searchsorted(unsupervised, last_target) - 1]) + 1
        # one token of the prompt stays, from which the first token of the answer is predicted
        needed = len(ids) - answer_start + 1
        for head in (self.encoder.prefix_length(sample, ids), int(ids[0] == self.encoder.bos_token_id)):
            if head + needed <= self.seq_length:
                break
        else:
            return Prepared(NOTHING, NOTHING, "too_long")
        start = len(ids) - (self.seq_length - head)
        tail = weights[start:].copy()
        if tail[0]:  # cut within an answer, or between it and its prompt
            tail[: int(np.argmin(tail))] = 0
        kept = np.concatenate([weights[:head], tail])
        kept[0] = 0
        return Prepared(np.concatenate([ids[:head], ids[start:]]), kept, truncated_tokens=start - head)


class SplitWriter:
    """Writes the samples of one split and counts them. Documents are joined and cut in blocks of seq_length + 1."""

    def __init__(self, writer: DatasetWriter, counts: SplitLedger, preparation: Preparation):
        self.writer, self.counts = writer, counts
        self.block = preparation.seq_length if preparation.template is None else None
        self.unknown_id = preparation.encoder.unknown_id
        self.carry: list[np.ndarray] = []
        self.carried = 0

    def add(self, item: Prepared) -> None:
        counts = self.counts
        counts.rows += 1
        counts.skipped_turns += item.skipped_turns
        if item.dropped:
            name = f"dropped_{item.dropped}"
            setattr(counts, name, getattr(counts, name) + 1)
        elif self.block is None:
            counts.truncated_samples += item.truncated_tokens > 0
            counts.truncated_tokens += item.truncated_tokens
            self._write(item.ids, item.loss_weights)
        else:
            self.carry.append(item.ids)
            self.carried += len(item.ids)
            if self.carried > 64 * self.block:
                self._cut(self.block, last=False)

    def close(self) -> None:
        if self.block is not None:
            self._cut(self.block, last=True)
        self.writer.close()

    def _cut(self, block: int, last: bool) -> None:
        stream, start = np.concatenate([NOTHING, *self.carry]), 0
        while len(stream) - start > block or (last and len(stream) - start > 1):
            ids = stream[start : start + block + 1]
            weights = np.ones(len(ids), dtype=np.uint8)
            weights[0] = 0
            self._write(ids, weights)
            # the last token of a block is only a target there; the next block starts with it
            start += block
        self.carry = [stream[start:]]
        self.carried = len(self.carry[0])

    def _write(self, ids: np.ndarray, weights: np.ndarray) -> None:
        self.writer.add(ids, weights)
        supervised = int(np.count_nonzero(weights))
        self.counts.samples += 1
        self.counts.tokens += len(ids)
        self.counts.supervised += supervised
        self.counts.masked += len(ids) - supervised
        if self.unknown_id is not None:
            self.counts.unknown_tokens += int(np.count_nonzero(ids == self.unknown_id))


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


_preparation: Preparation | None = None


def _start_worker(preparation: Preparation) -> None:
    global _preparation
    _preparation = preparation


def _prepare_in_worker(rows: list[Row]) -> list[Prepared]:
    assert _preparation is not None
    return _preparation(rows)


def prepared_chunks(rows: Iterable[Row], preparation: Preparation, num_workers: int) -> Iterator[list[Prepared]]:
    """The rows' Prepared in order, chunk by chunk. num_workers > 1: that many spawned processes.

    The tokenizer's own threads already use several cores in one process; workers help where rendering dominates.
    """
    chunks = _chunks(rows)
    first = list(islice(chunks, 4))
    if num_workers <= 1 or len(first) < 4:  # starting a process costs more than a few chunks
        for chunk in first:
            yield preparation(chunk)
        for chunk in chunks:
            yield preparation(chunk)
        return
    # spawned, not forked: the parent has threads (torch, gloo, the tokenizer's)
    with ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(preparation,)
    ) as pool:
        pending = deque(pool.submit(_prepare_in_worker, chunk) for chunk in first)
        for chunk in chunks:
            pending.append(pool.submit(_prepare_in_worker, chunk))
            if len(pending) > 4 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
