"""Batches: a data-parallel rank's micro-batches of a global batch, padded or packed, at any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from primus_bridge.data.loader import SequenceRef, whole
from primus_bridge.data.store import TokenizedDataset

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BatchShape:
    """How a layout wants its micro-batches cut.

    pad_to: 'longest' of the micro-batch over all ranks, or 'seq_length'. same_length: every micro-batch of a global
    batch as long as the longest (a pipeline needs one shape). multiple_of: lengths are rounded up to a multiple of it.
    noise_seed: with one, each document gets a seed of its own for NEFTune.
    """

    micro_batch_size: int
    dp_rank: int
    dp_size: int
    pad_id: int
    seq_length: int
    pad_to: str = "longest"
    same_length: bool = False
    multiple_of: int = 1
    noise_seed: int | None = None


def microbatches(sequences: Sequence[SequenceRef], shape: BatchShape) -> list[Batch]:
    """This data-parallel rank's micro-batches of one global batch, a multiple of micro_batch_size * dp_size.

    Each holds tokens, labels, position_ids (int64) and loss_mask (float32); labels are tokens shifted by one,
    loss_mask[b, i] is the weight of predicting labels[b, i]. Unpacked: [micro_batch_size, s], right padded (which
    causal attention never sees). Packed: one row [1, s] of all its documents end to end, padding last, with cu_seqlens
    int32 [documents + 1]: where each begins, and the last ends; position_ids restart with each.

    The order within a global batch changes nothing: the loss is a sum over all of it. The union over ranks and
    micro-batches is exactly the global batch, at any layout.
    """
    assert len(sequences) % (shape.micro_batch_size * shape.dp_size) == 0, (len(sequences), shape)
    dealt = _deal(sequences, shape)
    longest = max(padded for _, padded in dealt)
    packed = sequences[0].data.packed
    return [_collate(rows, longest if shape.same_length else padded, shape, packed) for rows, padded in dealt]


def evaluation_microbatches(
    data: TokenizedDataset, shape: BatchShape, *, max_sequences: int | None = None, num_microbatches: int = 1
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of a whole evaluation, in lists of exactly ``num_microbatches`` (a schedule call).

    Over all ranks every sequence (of the first max_sequences) comes exactly once, and every rank yields the same number
    of lists with the same shapes. Missing rows and micro-batches are filled with padding, whose loss_mask is zero.
    same_length: one length within each list.
    """
    dealt = _deal(list(whole(data, max_sequences)), shape)
    for start in range(0, len(dealt), num_microbatches):
        part = dealt[start : start + num_microbatches]
        part += [([], part[-1][1])] * (num_microbatches - len(part))
        longest = part[0][1]
        yield [_collate(rows, longest if shape.same_length else padded, shape, data.packed) for rows, padded in part]


def epoch_places(lengths: np.ndarray, shape: BatchShape, global_batch_size: int) -> int:
    """Places, padding included, of all ranks' unpacked micro-batches of an epoch.

    lengths: inputs of the epoch's sequences in their order, int [sequences]. Of the last global batch, which the next
    epoch fills up, its own rows count, cut and padded as if they were all of it.
    """
    whole_batches = len(lengths) // global_batch_size * global_batch_size
    full = np.reshape(lengths[:whole_batches], (-1, global_batch_size))
    return _places(full, shape) + _places(np.reshape(lengths[whole_batches:], (1, -1)), shape)


def _places(lengths: np.ndarray, shape: BatchShape) -> int:
    """Places of the rows of batches, int [batches, rows]; the last micro-batch of each may lack rows."""
    longest_first = -np.sort(-np.maximum(lengths, 1), axis=1)
    width = shape.micro_batch_size * shape.dp_size
    longest = longest_first[:, ::width]
    if shape.pad_to == "seq_length":
        longest = np.full_like(longest, shape.seq_length)
    elif shape.same_length:
        longest = np.broadcast_to(longest[:, :1], longest.shape)
    padded = -(-longest // shape.multiple_of) * shape.multiple_of
    return int(np.repeat(padded, width, axis=1)[:, : lengths.shape[1]].sum())


def _deal(sequences: Sequence[SequenceRef], shape: BatchShape) -> list[tuple[list[SequenceRef], int]]:
    """(this rank's sequences, padded length) of each micro-batch, longest first.

    Sequences are ordered by length and dealt to the ranks like cards, so that a micro-batch holds sequences of one
    length and all ranks have about the same work at the same time. The padded length is the same on every rank.
    """
    packed = sequences[0].data.packed
    lengths = np.array([max(sequence.data.inputs(sequence.index), 1) for sequence in sequences])
    order = np.argsort(-lengths, kind="stable")
    width = shape.micro_batch_size * shape.dp_size
    out = []
    for start in range(0, len(order), width):
        group = order[start : start + width]
        if shape.pad_to == "seq_length":
            longest = shape.seq_length * (shape.micro_batch_size if packed else 1)
        elif packed:
            longest = max(int(lengths[group[rank :: shape.dp_size]].sum()) for rank in range(shape.dp_size))
        else:
            longest = int(lengths[group[0]])  # the first of the group is its longest
        padded = -(-longest // shape.multiple_of) * shape.multiple_of
        out.append(([sequences[i] for i in group[shape.dp_rank :: shape.dp_size]], padded))
    return out


def _collate(rows: list[SequenceRef], length: int, shape: BatchShape, packed: bool) -> Batch:
    """One micro-batch of the given rows; what they leave of it is padding with no loss."""
    documents = [(row, member) for row in rows for member in row.data.members(row.index)]
    height = 1 if packed else shape.micro_batch_size
    tokens = np.full((height, length), shape.pad_id, dtype=np.int64)
    labels = np.full((height, length), shape.pad_id, dtype=np.int64)
    loss_mask = np.zeros((height, length), dtype=np.float32)
    positions = np.zeros((height, length), dtype=np.int64)
    if not packed:
        positions[:] = np.arange(length)
    ends = [0]
    for number, (row, member) in enumerate(documents):
        ids, weights = row.data[int(member)]
        line, start = (0, ends[-1]) if packed else (number, 0)
        end = start + len(ids) - 1
        tokens[line, start:end] = ids[:-1]
        labels[line, start:end] = ids[1:]
        loss_mask[line, start:end] = weights[1:]
        positions[line, start:end] = np.arange(len(ids) - 1)
        ends.append(end)
    batch = {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(loss_mask),
        "position_ids": torch.from_numpy(positions),
    }
    if packed:
        batch["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    if shape.noise_seed is not None:
        batch |= _noise(documents, None if packed else height, shape.noise_seed)
    return batch


def _noise(documents: list[tuple[SequenceRef, int]], height: int | None, seed: int) -> Batch:
    """noise_seeds int64, one a document; and of an unpacked batch of ``height`` rows its lengths, int64 [height]."""
    seeds = [
        int(np.random.SeedSequence([seed, row.ordinal, int(member)]).generate_state(1, np.uint64)[0] >> 1)
        for row, member in documents
    ]
    if height is None:
        return {"noise_seeds": torch.tensor(seeds, dtype=torch.int64)}
    missing = [0] * (height - len(documents))
    lengths = [len(row.data[int(member)][0]) - 1 for row, member in documents]
    return {"noise_seeds": torch.tensor(seeds + missing), "lengths": torch.tensor(lengths + missing)}
