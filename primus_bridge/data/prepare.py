"""From rows to samples: convert, render, weigh, tokenise, fit to length; in chunks, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from primus_bridge.data.ledger import Counts
from primus_bridge.data.masks import piece_weights
from primus_bridge.data.messages import Conversation, Message, RowError, Unusable
from primus_bridge.data.store import Origin
from primus_bridge.data.templates.base import Rendered, Template
from primus_bridge.data.tokenize import Encoder
from primus_bridge.errors import ConfigError
from primus_bridge.launch.signals import ASKING

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
class Pending:
    """A chunk of rows on its way: conversations with their texts, or plain documents, and where each belongs."""

    samples: dict[str, Samples]
    weighed: list[Weighed] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    places: list[tuple[Samples, Origin]] = field(default_factory=list)


NO_WEIGHTS = np.empty(0, dtype=np.float32)


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
        rendered = self.render(rows)
        return self.collect(rendered, self.tokenise(rendered))

    def render(self, rows: Sequence[PlacedRow]) -> Pending:
        """The rows as texts; templates and functions of the user's are called here, one row after the other."""
        pending = Pending({})
        for row, number, split in rows:
            samples = pending.samples.setdefault(split, Samples())
            samples.counts.rows += 1
            try:
                if self.template is None:
                    text = self.format.document(row.data)
                    if not text:
                        raise Unusable("empty")
                    pending.documents.append(text)
                    pending.places.append((samples, Origin(self.source, number, 0)))
                    continue
                conversations = self.format.conversations(row.data)
            except Unusable as unusable:
                samples.counts.drop(unusable.reason)
                continue
            except RowError as error:
                self._refuse(error, row, samples.counts)
                continue
            for part, conversation in enumerate(conversations):
                try:
                    pending.weighed.append(self.weigh(conversation, samples.counts))
                except RowError as error:
                    self._refuse(error, row, samples.counts)
                else:
                    pending.places.append((samples, Origin(self.source, number, part)))
        return pending

    def _refuse(self, error: RowError, row: Row, counts: Counts) -> None:
        if self.bad_rows == "stop":
            raise error.at(row) from None
        counts.drop("bad_row")

    def tokenise(self, pending: Pending) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, loss weights) of each text; calls nothing but the encoder, so that it may run beside ``render``."""
        if self.template is None:
            return [(ids, NO_WEIGHTS) for ids in self.encoder.encode_documents(pending.documents)]
        weighed = pending.weighed
        return self.encoder.encode_rendered([w.rendered for w in weighed], [w.weights for w in weighed])

    def collect(self, pending: Pending, encoded: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Samples]:
        """The samples, of at most seq_length tokens (documents are cut when they are written)."""
        for index, ((samples, origin), (ids, weights)) in enumerate(zip(pending.places, encoded, strict=True)):
            fitted: tuple[np.ndarray, np.ndarray] | None = (ids, weights)
            if self.template is not None:
                fitted = self._fit(pending.weighed[index], ids, weights, samples.counts)
            if fitted is not None:
                samples.ids.append(fitted[0])
                samples.loss_weights.append(fitted[1])
                samples.origins.append(origin)
        return pending.samples

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

    def _fit(
        self, sample: Weighed, ids: np.ndarray, weights: np.ndarray, counts: Counts
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(ids, weights) of at most seq_length tokens, or None when the sample is dropped; both are counted."""
        if not weights.any():
            counts.drop("no_supervised")
            return None
        if len(ids) <= self.seq_length:
            return ids, weights
        before, turns = len(ids), 0
        if self.truncation == "drop":
            counts.drop("too_long")
            return None
        if self.truncation == "right":
            ids, weights = ids[: self.seq_length], weights[: self.seq_length]
            if self.loss_on != "all" and self.prompt_loss_weight and not self._holds_an_answer(sample, weights):
                counts.drop("cut_away")
                return None
        else:
            shorter = self.without_oldest_turns(sample)
            if shorter is None:
                counts.drop("too_long")
                return None
            turns = len(sample.conversation.messages) - len(shorter.conversation.messages)
            [(ids, weights)] = self.encoder.encode_rendered([shorter.rendered], [shorter.weights])
        if not weights.any():
            counts.drop("cut_away")
            return None
        counts.truncated_samples += 1
        counts.truncated_turns += turns
        counts.truncated_tokens += before - len(ids)
        return ids, weights

    def _holds_an_answer(self, sample: Weighed, weights: np.ndarray) -> bool:
        """Whether the beginning of a sample that these weights are of holds a token of an answer with a loss."""
        places = self.encoder.trace(sample.rendered)[1][: len(weights)]
        written = np.array([piece.supervised for piece in sample.rendered.pieces] + [False])[places]
        return bool((written & (weights > 0)).any())

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
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """No signal but SIGKILL ends a worker, so that it must see for itself that nobody is left to work for."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Worker(SpawnProcess):
    """A process that SIGTERM and SIGUSR1 do not reach: Slurm sends them to all of a job, and the rank answers them."""

    def start(self) -> None:
        with _signals_held():  # what is spawned inherits it, from its first moment on
            super().start()

    def terminate(self) -> None:
        """What a pool with a dead worker ends the others by."""
        self.kill()


class _Workers(SpawnContext):
    Process = _Worker


@contextmanager
def _signals_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_in_worker(rows: list[PlacedRow]) -> dict[str, Samples]:
    assert _preparation is not None
    return _preparation(rows)


def prepared_chunks(
    rows: Iterable[PlacedRow], preparation: Preparation, num_workers: int
) -> Iterator[dict[str, Samples]]:
    """The rows' samples in order, chunk by chunk. num_workers > 1: in that many spawned processes.

    Else the tokenizer, which works without Python's lock and in threads of its own, has one chunk while the next is
    rendered; all the rest runs in the caller's thread.
    """
    chunks = _chunks(rows)
    first = list(islice(chunks, 4))
    if num_workers > 1 and len(first) == 4:  # starting a process costs more than a few chunks
        yield from _by_workers(chain(first, chunks), preparation, num_workers)
        return
    with ThreadPoolExecutor(1) as pool:
        pending: deque[tuple[Pending, Future[list[tuple[np.ndarray, np.ndarray]]]]] = deque()
        for chunk in chain(first, chunks):
            rendered = preparation.render(chunk)
            pending.append((rendered, pool.submit(preparation.tokenise, rendered)))
            if len(pending) > 2:
                rendered, encoded = pending.popleft()
                yield preparation.collect(rendered, encoded.result())
        for rendered, encoded in pending:
            yield preparation.collect(rendered, encoded.result())


def _by_workers(
    chunks: Iterable[list[PlacedRow]], preparation: Preparation, num_workers: int
) -> Iterator[dict[str, Samples]]:
    # spawned, not forked: the parent has threads (torch, gloo, the tokenizer's)
    with _signals_held():
        resource_tracker.ensure_running()
    with ProcessPoolExecutor(num_workers, _Workers(), initializer=_start_worker, initargs=(preparation,)) as pool:
        pending: deque[Future[dict[str, Samples]]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_prepare_in_worker, chunk))
                if len(pending) > 4 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ConfigError(
                f"one of the {num_workers} processes that tokenise ended (out of memory?); lower dataset.num_workers"
            ) from None
