"""The sequences of a data set as they are trained on, with everything that a person wants to know of each token."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.data.ledger import Counts
from primus_bridge.data.loader import SequenceRef, open_loader, whole
from primus_bridge.data.pieces import token_pieces
from primus_bridge.data.pipeline import Pipeline
from primus_bridge.data.prepare import Weighed
from primus_bridge.data.store import Origin
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from primus_bridge.data.dataset import DataBundle


@dataclass
class InspectedSequence:
    """One sequence: a sample, or several in a pack. Lists have one entry a token; documents are whole, not shifted."""

    ids: list[int]
    loss_weights: list[float]
    """Weight of predicting this token; 0 for the first token of a document."""
    position_ids: list[int]
    segments: list[int]
    """0, 1, ...: which document of the pack."""
    turns: list[int]
    """Index of the token's message within its conversation; -1: the template's own text."""
    roles: list[str]
    """The role of that message; "" for none."""
    pieces: list[str]
    """The text of each token, as pieces.token_pieces gives it."""
    text: str
    supervised_text: str
    sources: list[str]
    """``file:line`` of each segment."""


def inspect_sequences(
    arguments: BridgeArguments, tokenizer: PreTrainedTokenizerFast, bundle: DataBundle, split: str, count: int
) -> list[InspectedSequence]:
    """The first ``count`` sequences of a split, of train in the order of training, as the batches hold them.

    Turns and roles are found by taking the samples' rows through the pipeline once more, with the place of each token;
    the ids must come out as they are stored.
    """
    pipeline = Pipeline(arguments, tokenizer)
    if split == "validation":
        assert bundle.validation is not None
        chosen = list(whole(bundle.validation, count))
    else:
        chosen = _first_of_training(arguments, bundle, count)
    wanted = {ref.data.origin(int(member)) for ref in chosen for member in ref.data.members(ref.index)}
    found = _traced(pipeline, wanted)
    return [_sequence(ref, found, tokenizer) for ref in chosen]


def _first_of_training(arguments: BridgeArguments, bundle: DataBundle, count: int) -> list[SequenceRef]:
    """The first sequences of the first epoch; all of it when it is shorter."""
    loader = open_loader(bundle.train, arguments.rng.seed, arguments.dataset.shuffle)
    chosen: list[SequenceRef] = []
    while len(chosen) < count and loader.state()["epoch"] == 0:
        chosen += loader.next(1)
    return chosen


@dataclass
class _Traced:
    """A sample's turns and roles by token, and where its row is."""

    where: str
    ids: np.ndarray
    turns: list[int]
    roles: list[str]


def _traced(pipeline: Pipeline, wanted: set[Origin]) -> dict[Origin, _Traced]:
    rows: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for origin in wanted:
        rows[origin.source][origin.row].add(origin.part)
    out: dict[Origin, _Traced] = {}
    for source, by_row in rows.items():
        opened, last = pipeline.sources[source], max(by_row)
        for index, row in enumerate(opened.rows):
            for part in by_row.get(index, ()):
                out[Origin(source, index, part)] = _trace(pipeline, source, row, part)
            if index == last:
                break
    return out


def _trace(pipeline: Pipeline, source: int, row, part: int) -> _Traced:
    if pipeline.template is None:
        return _Traced(row.where, np.empty(0), [], [])
    preparation = pipeline.preparation(source)
    sample = preparation.weigh(preparation.format.conversations(row.data)[part], Counts())
    ids, places = pipeline.encoder.trace(sample.rendered)
    if len(ids) > preparation.seq_length and preparation.truncation == "left":
        shorter = preparation.without_oldest_turns(sample)
        assert shorter is not None
        sample = shorter
        ids, places = pipeline.encoder.trace(sample.rendered)
    turns = [_turn(sample, int(place)) for place in places]
    messages = sample.conversation.messages
    return _Traced(row.where, ids, turns, [messages[turn].role if turn >= 0 else "" for turn in turns])


def _turn(sample: Weighed, place: int) -> int:
    return sample.rendered.pieces[place].turn if place >= 0 else -1


def _sequence(ref: SequenceRef, found: dict[Origin, _Traced], tokenizer: PreTrainedTokenizerFast) -> InspectedSequence:
    out = InspectedSequence([], [], [], [], [], [], [], "", "", [])
    for segment, member in enumerate(ref.data.members(ref.index)):
        ids, weights = ref.data[int(member)]
        traced = found[ref.data.origin(int(member))]
        count = len(ids)
        if len(traced.ids):
            # cut at the end, the stored sample is a part of the traced one
            if not np.array_equal(traced.ids[:count], ids):
                raise ConfigError(
                    "the row gives other tokens than the cache has: what format_function imports has changed? Remove "
                    "the cache (PRIMUS_BRIDGE_CACHE, or ~/.cache/primus_bridge)",
                    where=traced.where,
                )
        pieces = token_pieces(tokenizer, ids.tolist())
        out.ids += ids.tolist()
        out.loss_weights += [
            round(weight, 6) for weight in weights.tolist()
        ]  # stored as float32: 0.1, not 0.10000000149
        out.position_ids += range(count)
        out.segments += [segment] * count
        out.turns += traced.turns[:count] or [-1] * count
        out.roles += traced.roles[:count] or [""] * count
        out.pieces += pieces
        out.sources.append(traced.where)
    out.text = "".join(out.pieces)
    out.supervised_text = "".join(
        piece for piece, weight in zip(out.pieces, out.loss_weights, strict=True) if weight > 0
    )
    return out
