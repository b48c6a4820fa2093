"""Batches: the union over layouts, padding, packing, and evaluation that covers every sample once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from primus_bridge.data.batches import BatchShape, epoch_places, evaluation_microbatches, microbatches
from primus_bridge.data.loader import WholeLoader, whole
from primus_bridge.data.packing import pack
from primus_bridge.data.store import TokenizedDataset

PAD = 0


def samples(count: int, seed: int = 0) -> TokenizedDataset:
    """Samples of 2 to 30 tokens; token values are unique over the set, so that each token names its sample."""
    lengths = np.random.default_rng(seed).integers(2, 31, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    weights = (np.random.default_rng(seed + 1).random(offsets[-1]) < 0.6).astype(np.float32)
    weights[offsets[:-1]] = 0
    return TokenizedDataset(ids, weights, offsets)


def packed(count: int, capacity: int = 40, seed: int = 0) -> TokenizedDataset:
    """The same samples in packs."""
    data = samples(count, seed)
    packs = pack(data.lengths - 1, capacity)
    data.pack_samples = np.array([i for members in packs for i in members])
    data.pack_offsets = np.concatenate([[0], np.cumsum([len(members) for members in packs])])
    return data


def shape(micro_batch_size=1, dp_rank=0, dp_size=1, **options) -> BatchShape:
    return BatchShape(micro_batch_size, dp_rank, dp_size, pad_id=PAD, seq_length=40, **options)


def documents_of(batches) -> Counter:
    """The documents of packed batches as rows_of counts rows; their positions and the padding are checked."""
    found = Counter()
    for batch in batches:
        ends = batch["cu_seqlens"].tolist()
        assert ends[0] == 0 and batch["tokens"].shape[0] == 1
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert not batch[name][0, ends[-1] :].any()  # PAD is 0
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
            found[tuple(tuple(batch[name][0, start:end].tolist()) for name in ("tokens", "labels", "loss_mask"))] += 1
    return found


def rows_of(batches) -> Counter:
    """(tokens, labels, mask) of each row without its padding, counted; rows of padding alone left out."""
    rows = Counter()
    for batch in batches:
        for tokens, labels, mask in zip(batch["tokens"], batch["labels"], batch["loss_mask"], strict=True):
            length = int((tokens != PAD).sum())
            assert not mask[length:].any() and not tokens[length:].any() and not labels[length:].any()
            if length:
                rows[
                    tuple(tokens[:length].tolist()), tuple(labels[:length].tolist()), tuple(mask[:length].tolist())
                ] += 1
    return rows


def expected_rows(dataset, indices) -> Counter:
    rows = Counter()
    for i in indices:
        ids, weights = dataset[int(i)]
        rows[tuple(ids[:-1].tolist()), tuple(ids[1:].tolist()), tuple(weights[1:].astype(float).tolist())] += 1
    return rows


LAYOUTS = [(1, 1), (1, 2), (4, 1), (2, 2), (1, 8), (8, 1), (4, 2), (3, 4)]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"same_length": True}, {"pad_to": "seq_length"}, {"multiple_of": 8}])
def test_the_union_over_ranks_is_the_global_batch(micro_batch_size, dp_size, options):
    dataset = samples(64)
    loader = WholeLoader(dataset, seed=0)
    loader.next(48)
    batch = loader.next(24)
    indices = [ref.index for ref in batch]
    ranks = [microbatches(batch, shape(micro_batch_size, rank, dp_size, **options)) for rank in range(dp_size)]
    assert rows_of(batch for rank in ranks for batch in rank) == expected_rows(dataset, indices)
    shapes = [[tuple(batch["tokens"].shape) for batch in rank] for rank in ranks]
    assert all(each == shapes[0] for each in shapes)  # ranks work on the same shapes at the same time
    assert len(shapes[0]) == 24 // (micro_batch_size * dp_size)
    longest = int(dataset.lengths[indices].max()) - 1
    for rows, length in shapes[0]:
        assert rows == micro_batch_size
        assert length % options.get("multiple_of", 1) == 0
        if options.get("pad_to"):
            assert length == 40
        if options.get("same_length"):
            assert length == longest
    for batch in ranks[0]:
        assert {name: tensor.dtype for name, tensor in batch.items()} == {
            "tokens": torch.int64,
            "labels": torch.int64,
            "loss_mask": torch.float32,
            "position_ids": torch.int64,
        }
        assert torch.equal(batch["position_ids"], torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"]))


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"same_length": True}, {"pad_to": "seq_length"}, {"multiple_of": 16}])
def test_packed_ranks_hold_every_document_once(micro_batch_size, dp_size, options):
    dataset = packed(64)
    batch = WholeLoader(dataset, seed=0).next(24)
    ranks = [microbatches(batch, shape(micro_batch_size, rank, dp_size, **options)) for rank in range(dp_size)]
    members = [int(member) for ref in batch for member in dataset.members(ref.index)]
    assert documents_of(b for rank in ranks for b in rank) == expected_rows(dataset, members)
    lengths = [[b["tokens"].shape[1] for b in rank] for rank in ranks]
    assert all(each == lengths[0] for each in lengths)
    for length in lengths[0]:
        assert length % options.get("multiple_of", 1) == 0 and length <= 48 * micro_batch_size
        if options.get("pad_to"):
            assert length == 40 * micro_batch_size
        if options.get("same_length"):
            assert length == lengths[0][0]


def test_noise_seeds_are_the_documents_whatever_the_layout():
    for dataset in (samples(32), packed(32)):
        batch = WholeLoader(dataset, seed=0).next(dataset.num_sequences // 4 * 4)

        def seeds(micro_batch_size, dp_size, batch=batch):
            found = Counter()
            for rank in range(dp_size):
                for b in microbatches(batch, shape(micro_batch_size, rank, dp_size, noise_seed=7)):
                    found.update(b["noise_seeds"].tolist())
                    assert ("lengths" in b) == ("cu_seqlens" not in b)
                    if "lengths" in b:
                        assert b["lengths"].tolist() == [int((row != PAD).sum()) for row in b["tokens"]]
                    else:
                        assert len(b["noise_seeds"]) == len(b["cu_seqlens"]) - 1
            return found

        assert seeds(1, 1) == seeds(2, 2) == seeds(4, 1) and max(seeds(1, 1).values()) == 1
        again = microbatches(batch, shape(1, noise_seed=8))
        assert not set(seeds(1, 1)) & {seed for b in again for seed in b["noise_seeds"].tolist()}


@pytest.mark.parametrize("options", [{}, {"same_length": True}, {"pad_to": "seq_length"}, {"multiple_of": 8}])
def test_the_places_of_an_epoch_are_those_of_its_batches(options):
    dataset = samples(48)
    loader = WholeLoader(dataset, seed=5)
    counted = epoch_places(loader.epoch_inputs(), shape(2, 0, 2, **options), 16)
    made = 0
    for _ in range(3):
        batch = loader.next(16)
        for rank in range(2):
            made += sum(b["tokens"].numel() for b in microbatches(batch, shape(2, rank, 2, **options)))
    assert counted == made


@pytest.mark.parametrize("options", [{}, {"same_length": True}, {"pad_to": "seq_length"}, {"multiple_of": 8}])
def test_the_last_batch_of_an_epoch_counts_its_own_rows(options):
    random = np.random.default_rng(0)
    for _ in range(50):
        rows, ranks, times = random.integers(1, 4, 3)
        batch = int(rows * ranks * times)
        lengths = random.integers(0, 41, random.integers(1, 30))
        padded = []
        for start in range(0, len(lengths), batch):
            longest_first = sorted((max(int(n), 1) for n in lengths[start : start + batch]), reverse=True)
            for group in range(0, len(longest_first), rows * ranks):
                longest = longest_first[0 if "same_length" in options else group]
                longest = 40 if "pad_to" in options else longest
                longest += -longest % options.get("multiple_of", 1)
                padded += [longest] * len(longest_first[group : group + rows * ranks])
        counted = epoch_places(lengths, shape(int(rows), 0, int(ranks), **options), batch)
        assert counted == sum(padded) >= lengths.sum()
    assert epoch_places(np.array([5, 5, 40]), shape(), 2) == epoch_places(np.array([40, 5, 5]), shape(), 2) == 50


def test_samples_of_one_length_share_a_microbatch():
    dataset = samples(256)
    ranks = [microbatches(list(whole(dataset)), shape(4, rank, 2)) for rank in range(2)]
    useful = int((dataset.lengths - 1).sum())
    padded = sum(batch["tokens"].numel() for rank in ranks for batch in rank)
    assert padded < 1.05 * useful
    work = [sum(int((batch["tokens"] != PAD).sum()) for batch in rank) for rank in ranks]
    assert abs(work[0] - work[1]) < 0.02 * useful


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (4, 1), (4, 2), (2, 3), (8, 8)])
@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("most", [None, 9, 1000])
@pytest.mark.parametrize("make", [samples, packed])
def test_evaluation_covers_every_sample_once(micro_batch_size, dp_size, num_microbatches, most, make):
    dataset = make(23)
    ranks = [
        list(
            evaluation_microbatches(
                dataset,
                shape(micro_batch_size, rank, dp_size),
                max_sequences=most,
                num_microbatches=num_microbatches,
            )
        )
        for rank in range(dp_size)
    ]
    count = min(dataset.num_sequences, most or 23)
    members = [int(member) for i in range(count) for member in dataset.members(i)]
    found = documents_of if dataset.packed else rows_of
    assert found(b for rank in ranks for part in rank for b in part) == expected_rows(dataset, members)
    shapes = [[[tuple(b["tokens"].shape) for b in part] for part in rank] for rank in ranks]
    assert all(each == shapes[0] for each in shapes)
    assert all(len(part) == num_microbatches for part in shapes[0])


def test_evaluation_at_one_length_a_call():
    parts = evaluation_microbatches(samples(23), shape(2, same_length=True, multiple_of=4), num_microbatches=4)
    for part in parts:
        assert len({batch["tokens"].shape for batch in part}) == 1
        assert part[0]["tokens"].shape[1] % 4 == 0
