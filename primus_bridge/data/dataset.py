"""The tokenised data set: built once a node, cached by content, memory-mapped by every rank, without any collective."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.data.cache import cached_folder
from primus_bridge.data.ledger import Ledger
from primus_bridge.data.mixture import epoch_samples
from primus_bridge.data.order import seeded_order
from primus_bridge.data.packing import pack
from primus_bridge.data.pipeline import Opened, Pipeline, identity
from primus_bridge.data.prepare import PlacedRow, prepared_chunks
from primus_bridge.data.progress import shown
from primus_bridge.data.store import TokenizedDataset, save_sequences
from primus_bridge.data.writer import SplitWriter
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from primus_bridge.data.stream import Stream


@dataclass
class DataBundle:
    """A run's data. train is a Stream with dataset.streaming, whose ledger grows as it is read."""

    train: TokenizedDataset | Stream
    validation: TokenizedDataset | None
    ledger: Ledger
    largest_id: int


def check_vocabulary(data: DataBundle, tokenizer: PreTrainedTokenizerFast, vocab_size: int, where: str) -> None:
    """Raises ConfigError when the data uses a token that the model has no embedding for. where: the tokenizer.

    A stream's later windows are checked when they come.
    """

    def check(largest_id: int) -> None:
        if largest_id >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(largest_id)
            raise ConfigError(
                f"the tokenizer does not fit the model: the data uses token {largest_id} ({token!r}), and the model's "
                f"vocabulary ends at {vocab_size - 1}; give the model's own tokenizer, or resize its embeddings first",
                where=where,
            )

    check(data.largest_id)
    if not isinstance(data.train, TokenizedDataset):
        data.train.check_largest_id = check


def build_datasets(arguments: BridgeArguments, tokenizer: PreTrainedTokenizerFast) -> DataBundle:
    """The train and validation sets of a run. Called by every rank; one a node does the work, the others wait for it.

    A sample of SFT holds at most ``model.seq_length`` tokens (BOS, prompt, answer and end of turn together); a block of
    pretraining seq_length + 1, of which the last is only a target, and neighbouring blocks share that token: every
    token is predicted once. Documents follow one another in a block and may attend to each other, unless
    packed_sequence keeps them apart.

    The split into train and validation is by row, chosen by ``rng.seed``, the same at any layout.
    Raises ConfigError for whatever is wrong with the data: it names file, line and row, or counts why nothing is left,
    or that more than max_dropped_fraction is lost.
    """
    pipeline = Pipeline(arguments, tokenizer)
    if arguments.dataset.streaming:
        from primus_bridge.data.stream import open_stream

        return open_stream(pipeline)
    key = identity(arguments, tokenizer, pipeline.sources)
    folder, ledger, meta = _built(pipeline, key, range(len(pipeline.sources)))
    train = TokenizedDataset.open(folder, "train")
    train.digest = meta.get("digest") or train.content_digest()  # a cache of before has none
    validation = TokenizedDataset.open(folder, "validation") if "validation" in ledger.splits else None
    return DataBundle(train, validation, ledger, meta["largest_id"])


def build_validation(pipeline: Pipeline) -> tuple[TokenizedDataset, Ledger, int]:
    """(the validation set of a streaming run, its ledger, its largest id): it is read whole."""
    which = [number for number, opened in enumerate(pipeline.sources) if opened.split == "validation"]
    key = identity(pipeline.arguments, pipeline.tokenizer, [pipeline.sources[number] for number in which])
    # samples name their source by its index
    folder, ledger, meta = _built(pipeline, f"{key}-{which[0]}", which)
    return TokenizedDataset.open(folder, "validation"), ledger, meta["largest_id"]


def _built(pipeline: Pipeline, key: str, which: Sequence[int]) -> tuple[Path, Ledger, dict[str, Any]]:
    """(the cache's folder of these sources, its ledger, its meta.json)"""
    folder = cached_folder(key, lambda to: _build(to, pipeline, which))
    meta = json.loads((folder / "meta.json").read_text())
    ledger = Ledger.from_dict(meta["ledger"])
    for told, number in zip(ledger.sources, which, strict=True):
        told.name = pipeline.sources[number].spec.name  # the same rows may have lain elsewhere when they were read
    return folder, ledger, meta


def _build(folder: Path, pipeline: Pipeline, which: Sequence[int]) -> None:
    """Tokenises the sources of these indices into ``folder``; meta.json is written last."""
    arguments = pipeline.arguments
    held_out = arguments.dataset.validation_split
    ledger = pipeline.ledger(which)
    writers: dict[str, SplitWriter] = {}
    for number, told in zip(which, ledger.sources, strict=True):
        opened, counts = pipeline.sources[number], told.counts
        splits = ("train", "validation") if held_out and opened.split == "train" else (opened.split,)
        for split in splits:
            if split not in writers:
                writers[split] = pipeline.writer(folder, split)
        chunks = prepared_chunks(_placed(opened, pipeline), pipeline.preparation(number), pipeline.num_workers)
        counted = ((sum(samples.counts.rows for samples in chunk.values()), chunk) for chunk in chunks)
        for chunk in shown(counted, f"tokenising {opened.spec.name}", opened.number_of_rows):
            for split, samples in chunk.items():
                writers[split].add(samples, counts[split])
        for split in splits:
            writers[split].end_source()
    for writer in writers.values():
        writer.close()
    for split in writers:
        pipeline.check_left(ledger, split)
    for split, writer in writers.items():
        save_epoch(folder, split, writer, pipeline, ledger)
    if not ledger.sequences.count and "train" in writers:
        raise ConfigError("an epoch has no sample: the weights of dataset.sources are too small for so few rows")
    meta = {"ledger": ledger.to_dict(), "largest_id": max(writer.writer.largest_id for writer in writers.values())}
    if "train" in writers:
        meta["digest"] = TokenizedDataset.open(folder, "train").content_digest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def save_epoch(
    folder: Path, split: str, writer: SplitWriter, pipeline: Pipeline, ledger: Ledger, window: Sequence[int] = ()
) -> None:
    """Write the sequences of an epoch beside the samples, and count them: by the sources' weights, and packed.

    window: of a stream, where it begins: what it holds is a part of the epoch.
    """
    arguments = pipeline.arguments
    data = TokenizedDataset.open(folder, split)
    samples = None
    if split == "train":
        weights = [opened.spec.weight for opened in pipeline.sources]
        sources = np.array(writer.sources, dtype=np.int64)
        seed = [arguments.rng.seed, *(row + 1 for row in window)]
        samples = epoch_samples(sources, weights, seed, part=bool(window))
    packed = arguments.dataset.packed_sequence
    if packed or samples is not None:
        samples = np.arange(len(data)) if samples is None else samples
        # a sample of n tokens is n - 1 inputs: its last token is only a target
        packs = pack((data.lengths - 1)[samples], arguments.model.seq_length) if packed else None
        save_sequences(folder, split, samples, packs)
        data = TokenizedDataset.open(folder, split)
    if split != "train":
        return
    sequences = ledger.sequences
    sequences.count, sequences.packed = data.num_sequences, packed
    sequences.inputs = int((data.lengths - 1)[samples].sum() if samples is not None else (data.lengths - 1).sum())
    if packed:  # what unpacked batches take depends on the layout
        sequences.places = data.num_sequences * arguments.model.seq_length


def _placed(opened: Opened, pipeline: Pipeline) -> Iterator[PlacedRow]:
    """The rows with their split: those held out for validation are chosen by seed."""
    rows: Iterable = opened.rows
    fraction = pipeline.arguments.dataset.validation_split
    if not fraction or opened.split != "train":
        for index, row in enumerate(rows):
            yield PlacedRow(row, index, opened.split)
        return
    rows = opened.counted_rows()
    held_out = _held_out(len(rows), fraction, pipeline.arguments.rng.seed, opened.spec.path)
    for index, row in enumerate(rows):
        yield PlacedRow(row, index, "validation" if held_out[index] else "train")


def _held_out(rows: int, fraction: float, seed: int, where: str) -> np.ndarray:
    """bool [rows]: which rows are for validation, chosen by seed; at least one, and not all."""
    count = max(1, round(rows * fraction))
    if count >= rows:
        raise ConfigError(
            f"dataset.validation_split {fraction} of {rows} rows leaves nothing to train on; "
            "lower it, add rows, or set dataset.validation_data_path",
            where=where,
        )
    chosen = np.zeros(rows, dtype=bool)
    chosen[seeded_order(rows, seed, 0x5EED)[:count]] = True
    return chosen
