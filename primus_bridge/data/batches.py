"""Batches: which samples make optimizer step n, and their micro-batches on one data-parallel rank, at any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from primus_bridge.data.dataset import TokenizedDataset


class GlobalBatchSampler:
    """The sample indices of every optimizer step: a pure function of (seed, samples before), with no state to save.

    Epochs follow one another without a gap: each is its own permutation of all samples, and a batch may hold the tail
    of one and the head of the next. Nothing depends on the layout.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int, shuffle: bool = True):
        assert num_samples > 0 and global_batch_size > 0
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.seed, self.shuffle = seed, shuffle
        self._orders: dict[int, np.ndarray] = {}

    def indices(self, consumed: int) -> np.ndarray:
        """Sample indices, int64 [global_batch_size], of the optimizer step that ``consumed`` samples came before."""
        position, end, parts = consumed, consumed + self.global_batch_size, []
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            part = self._order(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                self._orders.clear()
            if self.shuffle:
                # numpy promises the raw stream of a bit generator for ever, but not that of Generator.permutation
                raw = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_samples)
                self._orders[epoch] = np.argsort(raw, kind="stable")
            else:
                self._orders[epoch] = np.arange(self.num_samples)
        return self._orders[epoch]


def _collate(
    dataset: TokenizedDataset, rows: np.ndarray, micro_batch_size: int, sequence: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """One micro-batch, right padded to ``sequence``; rows beyond len(rows) are padding with no loss."""
    tokens = np.full((micro_batch_size, sequence), pad_id, dtype=np.int64)
    labels = np.full((micro_batch_size, sequence), pad_id, dtype=np.int64)
    loss_mask = np.zeros((micro_batch_size, sequence), dtype=np.float32)
    for row, index in enumerate(rows):
        ids, weights = dataset[int(index)]
        length = len(ids) - 1
        tokens[row, :length] = ids[:-1]
        labels[row, :length] = ids[1:]
        loss_mask[row, :length] = weights[1:]
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(loss_mask),
        "position_ids": torch.arange(sequence).repeat(micro_batch_size, 1),
    }


def _deal(
    dataset: TokenizedDataset,
    indices: np.ndarray,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_to: str,
    seq_length: int,
    multiple_of: int,
) -> list[tuple[np.ndarray, int]]:
    """(this rank's sample indices, padded length) of each micro-batch, longest first.

    Samples are ordered by length and dealt to the ranks like cards, so that a micro-batch holds samples of one length
    and all ranks have about the same work at the same time. The padded length is the same on every rank.
    """
    lengths = dataset.offsets[indices + 1] - dataset.offsets[indices]
    order = np.argsort(-lengths, kind="stable")
    width = micro_batch_size * dp_size
    out = []
    for start in range(0, len(order), width):
        group = order[start : start + width]
        # a sample of n tokens is n - 1 inputs; the first of the group is its longest
        longest = seq_length if pad_to == "seq_length" else int(lengths[group[0]]) - 1
        padded = -(-max(longest, 1) // multiple_of) * multiple_of
        out.append((indices[group[dp_rank::dp_size]], padded))
    return out


def microbatches(
    dataset: TokenizedDataset,
    indices: Sequence[int] | np.ndarray,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_id: int,
    seq_length: int,
    pad_to: str = "longest",
    same_length: bool = False,
    multiple_of: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro-batches of one global batch.

    indices: the global batch, a multiple of micro_batch_size * dp_size. Each micro-batch holds tokens, labels,
    position_ids (int64) and loss_mask (float32), all [micro_batch_size, s] and right padded (which causal attention
    never sees); labels are tokens shifted by one, loss_mask[b, i] is the weight of predicting labels[b, i].

    pad_to: 'longest' of the micro-batch over all ranks, or 'seq_length'. same_length: every micro-batch of the global
    batch as long as the longest (a pipeline needs one shape). multiple_of: s is rounded up to a multiple of it.
    The order within a global batch changes nothing: the loss is a sum over all of it. The union over ranks and
    micro-batches is exactly the global batch, at any layout.
    """
    indices = np.asarray(indices, dtype=np.int64)
    assert len(indices) % (micro_batch_size * dp_size) == 0, (len(indices), micro_batch_size, dp_size)
    dealt = _deal(dataset, indices, micro_batch_size, dp_rank, dp_size, pad_to, seq_length, multiple_of)
    longest = max(padded for _, padded in dealt)
    return [
        _collate(dataset, rows, micro_batch_size, longest if same_length else padded, pad_id) for rows, padded in dealt
    ]


def evaluation_microbatches(
    dataset: TokenizedDataset,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_id: int,
    seq_length: int,
    pad_to: str = "longest",
    same_length: bool = False,
    multiple_of: int = 1,
    max_samples: int | None = None,
    num_microbatches: int = 1,
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """This rank's micro-batches of a whole evaluation, in lists of exactly ``num_microbatches`` (a schedule call).

    Over all ranks every sample (of the first max_samples) comes exactly once, and every rank yields the same number of
    lists with the same shapes. Missing rows and micro-batches are filled with rows whose loss_mask is zero.
    same_length: one length within each list.
    """
    count = len(dataset) if max_samples is None else min(max_samples, len(dataset))
    dealt = _deal(dataset, np.arange(count), micro_batch_size, dp_rank, dp_size, pad_to, seq_length, multiple_of)
    nothing = np.empty(0, dtype=np.int64)
    for start in range(0, len(dealt), num_microbatches):
        part = dealt[start : start + num_microbatches]
        part += [(nothing, part[-1][1])] * (num_microbatches - len(part))
        longest = part[0][1]
        yield [
            _collate(dataset, rows, micro_batch_size, longest if same_length else padded, pad_id)
            for rows, padded in part
        ]
