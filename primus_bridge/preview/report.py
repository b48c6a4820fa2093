"""A preview as a value: the first sequences of a split, and what the whole split looks like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.data.inspect import InspectedSequence
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from primus_bridge.data.store import TokenizedDataset


@dataclass
class Preview:
    split: str
    stage: str
    tokenizer: str
    """Its folder or hub id."""
    template: str
    format: str
    seq_length: int
    packed: bool
    streaming: bool
    """All numbers are of the first window."""
    total_sequences: int
    """Sequences of an epoch (streaming: of its first window), of which ``sequences`` are the first."""
    sequences: list[InspectedSequence]
    special_ids: frozenset[int]
    """Ids of the tokenizer's added tokens, which are shown as such."""
    ledger: list[str]
    lengths: np.ndarray
    """Tokens of each sample of the split, int64 [samples]."""
    supervised: np.ndarray
    """Those with a loss weight, int64 [samples]."""
    fill: np.ndarray | None
    """Of each packed sequence the part of its seq_length places that is used, float64 [sequences]; None: not packed."""

    def title(self) -> str:
        """``the first 3 of 3,127 packed sequences of the train split``."""
        kind = f"{'packed ' if self.packed else ''}sequence{'' if self.total_sequences == 1 else 's'}"
        first = "the first window of " if self.streaming else ""
        return f"the first {len(self.sequences):,} of {self.total_sequences:,} {kind} of {first}the {self.split} split"


@dataclass
class TokenCounts:
    """Tokens of one sequence: tokens == supervised + masked."""

    tokens: int
    supervised: int
    masked: int
    segments: int
    padding: int | None
    """Of a pack: places that are left, of which a document of n tokens takes n - 1. None: by the batch, if any."""

    @classmethod
    def of(cls, sequence: InspectedSequence, preview: Preview) -> TokenCounts:
        tokens, segments = len(sequence.ids), len(sequence.sources)
        supervised = sum(weight != 0 for weight in sequence.loss_weights)
        padding = preview.seq_length - (tokens - segments) if preview.packed else None
        return cls(tokens, supervised, tokens - supervised, segments, padding)


def collect(arguments: BridgeArguments, split: str, num: int) -> Preview:
    """The first ``num`` sequences of a split (train, validation) after the real pipeline, in the order of training.

    Reads config, tokenizer and data, through the cache of tokenised data that a run uses; no weights.
    Raises ConfigError for whatever is wrong with them, and when the config has no such split.
    """
    from primus_bridge.data.dataset import build_datasets
    from primus_bridge.data.inspect import inspect_sequences
    from primus_bridge.data.stream import Stream
    from primus_bridge.data.tokenizer import load_tokenizer

    name = _tokenizer_name(arguments)
    tokenizer = load_tokenizer(name)
    bundle = build_datasets(arguments, tokenizer)
    dataset = bundle.train if split == "train" else bundle.validation
    streaming = isinstance(dataset, Stream)
    if isinstance(dataset, Stream):
        dataset = dataset.window(dataset.begin).data
    if dataset is None:
        raise ConfigError(
            "there is no validation set: give data.validation_split (a fraction) or data.validation_data_path, "
            "or leave out --split"
        )
    ledger, seq_length = bundle.ledger, arguments.model.seq_length
    return Preview(
        split=split,
        stage=arguments.stage,
        tokenizer=name,
        template=ledger.template,
        format=", ".join(dict.fromkeys(source.format for source in ledger.sources)),
        seq_length=seq_length,
        packed=dataset.packed,
        streaming=streaming,
        total_sequences=dataset.num_sequences,
        sequences=inspect_sequences(arguments, tokenizer, bundle, split, num),
        special_ids=special_ids(tokenizer),
        ledger=ledger.lines(),
        lengths=dataset.lengths,
        supervised=supervised_of_samples(dataset),
        fill=fill_of_packs(dataset, seq_length) if dataset.packed else None,
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Ids of the tokens that were added to the vocabulary (control tokens, <think>, ...)."""
    return frozenset(tokenizer.added_tokens_decoder)


def supervised_of_samples(dataset: TokenizedDataset) -> np.ndarray:
    """Tokens with a loss weight of each sample, int64 [samples]. Every sample has a token."""
    if not len(dataset):
        return np.zeros(0, dtype=np.int64)
    return np.add.reduceat(dataset.loss_weights != 0, dataset.offsets[:-1], dtype=np.int64)


def fill_of_packs(dataset: TokenizedDataset, seq_length: int) -> np.ndarray:
    """The used part of each pack's places, float64 [sequences]: a document of n tokens takes n - 1 of them."""
    assert dataset.pack_samples is not None and dataset.pack_offsets is not None
    inputs = (dataset.lengths - 1)[dataset.pack_samples]
    return np.add.reduceat(inputs, dataset.pack_offsets[:-1]) / seq_length


def to_json_lines(sequences: Sequence[InspectedSequence]) -> str:
    """A JSON object a line and sequence: ids, loss_weights, position_ids, segments, text, supervised_text, and more."""
    return "".join(json.dumps(asdict(sequence), ensure_ascii=False) + "\n" for sequence in sequences)


def _tokenizer_name(arguments: BridgeArguments) -> str:
    named = arguments.tokenizer.tokenizer_model or arguments.checkpoint.hf_model_name_or_path
    if named is not None:
        return named
    checkpoint = arguments.checkpoint.load or arguments.checkpoint.pretrained_checkpoint
    if checkpoint is None:
        raise ConfigError(
            "no tokenizer: give hf_model_name_or_path (--hf_model_name_or_path), a Hugging Face folder or hub id, "
            "or tokenizer.tokenizer_model"
        )
    from pathlib import Path

    from primus_bridge.checkpoint.manifest import find

    return str(find(Path(checkpoint)).assets)
