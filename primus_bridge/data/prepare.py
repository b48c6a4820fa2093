"""From rows to samples: convert, render, weigh, tokenise, fit to length; in chunks, in this process or in several."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from primus_bridge.data.ledger import Counts
from primus_bridge.data.masks import piece_weights
from primus_bridge.data.messages import Conversation, Message, RowError, Unusable
from primus_bridge.data.store import Origin
from primus_bridge.data.templates.base import Rendered, Template
from primus_bridge.data.tokenize import Encoder

if TYPE_CHECKING:
    from primus_bridge.data.formats import Format
    from primus_bridge.data.sources import Row

CHUNK_ROWS = 256


class PlacedRow(NamedTuple):
    """A row, its index in its source, and the split it belongs to."""

    row: Row
    number: int
    split: str


@dataclass
class Samples:
    """The samples that a chunk of rows gave to one split, end to end, and the counts of those rows."""

    ids: list[np.ndarray] = field(default_factory=list)
    """int32 [n] each."""
    loss_weights: list[np.ndarray] = field(default_factory=list)
    """float32 [n] each; empty for plain documents, whose every token counts."""
    origins: list[Origin] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


class Weighed(NamedTuple):
    """A conversation with what the template made of it and a loss weight a piece."""

    conversation: Conversation
    rendered: Rendered
    weights: list[float]


@dataclass
class Preparation:
    """The way of one source's rows to samples. ``template`` is None for plain documents (pretraining)."""

    source: int
    """Index of the source, for origins."""
    format: Format
    template: Template | None
    encoder: Encoder
    seq_length: int
    truncation: str
    loss_on: str = "assistant"
    prompt_loss_weight: float = 0.0
    bad_rows: str = "stop"

    def __call__(self, rows: Sequence[PlacedRow]) -> dict[str, Samples]:
        """The samples by split, in order. Raises ConfigError naming file, row and column of a row that is wrong."""
        out: dict[str, Samples] = {}
        for _, _, split in rows:
            out.setdefault(split, Samples()).counts.rows += 1
        if self.template is None:
            self._documents(rows, out)
        else:
            self._conversations(rows, out)
        return out

    def _conversations(self, rows: Sequence[PlacedRow], out: dict[str, Samples]) -> None:
        weighed, places = [], []
        for row, index, split in rows:
            counts = out[split].counts
            try:
                for part, conversation in enumerate(self.format.conversations(row.data)):
                    weighed.append(self.weigh(conversation, counts))
                    places.append((out[split], Origin(self.source, index, part)))
            except Unusable as unusable:
                counts.drop(unusable.reason)
            except RowError as error:
                if self.bad_rows == "stop":
                    raise error.at(row) from None
                counts.drop("bad_row")
        encoded = self.encoder.encode_rendered([w.rendered for w in weighed], [w.weights for w in weighed])
        for sample, (ids, weights), (samples, origin) in zip(weighed, encoded, places, strict=True):
            fitted = self._fit(sample, ids, weights, samples.counts)
            if fitted is not None:
                samples.ids.append(fitted[0])
                samples.loss_weights.append(fitted[1])
                samples.origins.append(origin)

    def weigh(self, conversation: Conversation, counts: Counts) -> Weighed:
        """Render; turns of one role in a row are joined where the template refuses them. Raises RowError."""
        assert self.template is not None
        try:
            rendered = self.template.render(conversation)
        except RowError:
            merged = _merged(conversation)
            joined = len(conversation.messages) - len(merged.messages)
            if not joined:
                raise
            rendered, conversation = self.template.render(merged), merged
            counts.merged_turns += joined
        counts.skipped_turns += conversation.skipped_turns
        return self._weighed(conversation, rendered)

    def _weighed(self, conversation: Conversation, rendered: Rendered) -> Weighed:
        weights = piece_weights(rendered, conversation, self.loss_on, self.prompt_loss_weight)
        return Weighed(conversation, rendered, weights)

    def _documents(self, rows: Sequence[PlacedRow], out: dict[str, Samples]) -> None:
        texts, places = [], []
        for row, index, split in rows:
            try:
                text = self.format.document(row.data)
            except RowError as error:
                if self.bad_rows == "stop":
                    raise error.at(row) from None
                out[split].counts.drop("bad_row")
                continue
            if text:
                texts.append(text)
                places.append((out[split], Origin(self.source, index, 0)))
            else:
                out[split].counts.drop("empty")
        for (samples, origin), ids in zip(places, self.encoder.encode_documents(texts), strict=True):
            samples.ids.append(ids)
            samples.origins.append(origin)

    def _fit(
        self, sample: Weighed, ids: np.ndarray, weights: np.ndarray, counts: Counts
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(ids, weights) of at most seq_length tokens, or None when the sample is dropped; both are counted."""
        if not weights.any():
            counts.drop("no_supervised")
            return None
        if len(ids) <= self.seq_length:
            return ids, weights
        before = len(ids)
        if self.truncation == "drop":
            counts.drop("too_long")
            return None
        if self.truncation == "right":
            ids, weights = ids[: self.seq_length], weights[: self.seq_length]
        else:
            shorter = self.without_oldest_turns(sample)
            if shorter is None:
                counts.drop("too_long")
                return None
            counts.truncated_turns += len(sample.conversation.messages) - len(shorter.conversation.messages)
            [(ids, weights)] = self.encoder.encode_rendered([shorter.rendered], [shorter.weights])
        if not weights.any():
            counts.drop("cut_away")
            return None
        counts.truncated_samples += 1
        counts.truncated_tokens += before - len(ids)
        return ids, weights

    def without_oldest_turns(self, sample: Weighed) -> Weighed | None:
        """The conversation without its oldest exchanges, as few as make it fit; the system message stays.

        None when the last exchange alone is too long. It is rendered anew: what is left is what the template writes
        for the shorter conversation.
        """
        messages = sample.conversation.messages
        head = 1 if messages[0].role == "system" else 0
        ids, places = self.encoder.trace(sample.rendered)
        turns = np.array([piece.turn for piece in sample.rendered.pieces] + [-1])[places]
        for start in range(head + 1, len(messages)):
            if messages[start].role != "user" or messages[start - 1].role == "user":
                continue
            # what other turns take may change a little with the shorter text: only an estimate, and checked below
            if len(ids) - np.count_nonzero((turns >= head) & (turns < start)) > self.seq_length:
                continue
            shorter = sample.conversation._replace(messages=messages[:head] + messages[start:])
            assert self.template is not None
            try:
                weighed = self._weighed(shorter, self.template.render(shorter))
            except RowError:  # a template that cannot begin there
                continue
            if len(self.encoder.encode_rendered([weighed.rendered])[0][0]) <= self.seq_length:
                return weighed
        return None


def _merged(conversation: Conversation) -> Conversation:
    """Neighbouring turns of one role and weight, without tool calls, as one, a blank line between."""
    out: list[Message] = []
    for message in conversation.messages:
        last = out[-1] if out else None
        if (
            last is not None
            and last.role == message.role
            and last.role in ("user", "assistant")
            and last.weight == message.weight
            and not (last.tool_calls or message.tool_calls or message.thinking)
        ):
            out[-1] = last._replace(content=f"{last.text}\n\n{message.text}", context="")
        else:
            out.append(message)
    return conversation._replace(messages=out)


def _chunks(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


_preparation: Preparation | None = None


def _start_worker(preparation: Preparation) -> None:
    global _preparation
    _preparation = preparation


def _prepare_in_worker(rows: list[PlacedRow]) -> dict[str, Samples]:
    assert _preparation is not None
    return _preparation(rows)


def prepared_chunks(
    rows: Iterable[PlacedRow], preparation: Preparation, num_workers: int
) -> Iterator[dict[str, Samples]]:
    """The rows' samples in order, chunk by chunk. num_workers > 1: that many spawned processes, else three threads.

    The tokenizer works without Python's lock, and in threads of its own: while it has one chunk, another is rendered.
    Workers help where rendering dominates.
    """
    chunks = _chunks(rows)
    first = list(islice(chunks, 4))
    if num_workers > 1 and len(first) == 4:  # starting a process costs more than a few chunks
        # spawned, not forked: the parent has threads (torch, gloo, the tokenizer's)
        spawn = multiprocessing.get_context("spawn")
        pool: Executor = ProcessPoolExecutor(num_workers, spawn, initializer=_start_worker, initargs=(preparation,))
        prepare: Callable[[list[PlacedRow]], dict[str, Samples]] = _prepare_in_worker
        waiting = 4 * num_workers
    else:
        pool, prepare, waiting = ThreadPoolExecutor(3), preparation, 3
    with pool:
        pending: deque[Future[dict[str, Samples]]] = deque()
        for chunk in chain(first, chunks):
            pending.append(pool.submit(prepare, chunk))
            if len(pending) > waiting:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
