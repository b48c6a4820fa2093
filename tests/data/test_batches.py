"""Batches: the sample order, the union over layouts, padding, and evaluation that covers every sample once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from primus_bridge.data.batches import GlobalBatchSampler, evaluation_microbatches, microbatches
from primus_bridge.data.dataset import TokenizedDataset

PAD = 0


def samples(count: int, seed: int = 0) -> TokenizedDataset:
    """Samples of 2 to 30 tokens; token values are unique over the set, so that each token names its sample."""
    lengths = np.random.default_rng(seed).integers(2, 31, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    weights = (np.random.default_rng(seed + 1).random(offsets[-1]) < 0.6).astype(np.uint8)
    weights[offsets[:-1]] = 0
    return TokenizedDataset(ids, weights, offsets)


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


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (5, 16), (100, 8)])
def test_every_epoch_holds_every_sample_once(count, batch, shuffle):
    sampler = GlobalBatchSampler(count, batch, seed=3, shuffle=shuffle)
    steps = 3 * count
    stream = np.concatenate([sampler.indices(step * batch) for step in range(steps)])
    assert len(stream) == steps * batch
    epochs = [stream[i : i + count] for i in range(0, len(stream) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert (len({tuple(epoch) for epoch in epochs[:5]}) > 1) == shuffle


def test_the_order_is_a_pure_function_of_seed_and_step():
    first = GlobalBatchSampler(50, 8, seed=1)
    walked = [first.indices(8 * step).tolist() for step in range(40)]
    for step in (39, 0, 17, 6, 5):
        assert GlobalBatchSampler(50, 8, seed=1).indices(8 * step).tolist() == walked[step]
        assert first.indices(8 * step).tolist() == walked[step]
    # another batch size goes on with the next unseen sample
    assert GlobalBatchSampler(50, 16, seed=1).indices(24).tolist() == walked[3] + walked[4]
    assert GlobalBatchSampler(50, 8, seed=2).indices(0).tolist() != walked[0]


def test_the_order_does_not_change_with_numpy():
    """Recorded once: a resumed run must meet the same samples after an upgrade."""
    assert GlobalBatchSampler(10, 10, seed=1234).indices(0).tolist() == RECORDED


RECORDED = [8, 1, 6, 2, 0, 3, 5, 7, 4, 9]

LAYOUTS = [(1, 1), (1, 2), (4, 1), (2, 2), (1, 8), (8, 1), (4, 2), (3, 4)]


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"same_length": True}, {"pad_to": "seq_length"}, {"multiple_of": 8}])
def test_the_union_over_ranks_is_the_global_batch(micro_batch_size, dp_size, options):
    dataset = samples(64)
    indices = GlobalBatchSampler(64, 24, seed=0).indices(48)
    ranks = [
        microbatches(
            dataset,
            indices,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
            pad_id=PAD,
            seq_length=40,
            **options,
        )
        for rank in range(dp_size)
    ]
    assert rows_of(batch for rank in ranks for batch in rank) == expected_rows(dataset, indices)
    shapes = [[tuple(batch["tokens"].shape) for batch in rank] for rank in ranks]
    assert all(shape == shapes[0] for shape in shapes)  # ranks work on the same shapes at the same time
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


def test_samples_of_one_length_share_a_microbatch():
    dataset = samples(256)
    indices = np.arange(256)
    ranks = [
        microbatches(dataset, indices, micro_batch_size=4, dp_rank=r, dp_size=2, pad_id=PAD, seq_length=40)
        for r in range(2)
    ]
    useful = int((dataset.lengths - 1).sum())
    padded = sum(batch["tokens"].numel() for rank in ranks for batch in rank)
    assert padded < 1.05 * useful
    work = [sum(int((batch["tokens"] != PAD).sum()) for batch in rank) for rank in ranks]
    assert abs(work[0] - work[1]) < 0.02 * useful


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (4, 1), (4, 2), (2, 3), (8, 8)])
@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("max_samples", [None, 9, 1000])
def test_evaluation_covers_every_sample_once(micro_batch_size, dp_size, num_microbatches, max_samples):
    dataset = samples(23)
    ranks = [
        list(
            evaluation_microbatches(
                dataset,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
                pad_id=PAD,
                seq_length=40,
                max_samples=max_samples,
                num_microbatches=num_microbatches,
            )
        )
        for rank in range(dp_size)
    ]
    count = min(23, max_samples or 23)
    assert rows_of(b for rank in ranks for part in rank for b in part) == expected_rows(dataset, range(count))
    masks = sum(float(b["loss_mask"].sum()) for rank in ranks for part in rank for b in part)
    assert masks == dataset.loss_weights[: dataset.offsets[count]].sum()
    shapes = [[[tuple(b["tokens"].shape) for b in part] for part in rank] for rank in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(len(part) == num_microbatches for part in shapes[0])


def test_evaluation_at_one_length_a_call():
    parts = evaluation_microbatches(
        samples(23),
        micro_batch_size=2,
        dp_rank=0,
        dp_size=1,
        pad_id=PAD,
        seq_length=40,
        same_length=True,
        multiple_of=4,
        num_microbatches=4,
    )
    for part in parts:
        assert len({batch["tokens"].shape for batch in part}) == 1
        assert part[0]["tokens"].shape[1] % 4 == 0
