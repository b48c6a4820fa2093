"""The rows that engine bridge reads by number are the core engine's batches, at any layout and after any resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from primus_bridge.bridge.samples import Cut, TrainingRows, ValidationRows, check_whole_weights
from primus_bridge.data.batches import BatchShape, microbatches
from primus_bridge.data.loader import WholeLoader
from primus_bridge.data.store import TokenizedDataset
from primus_bridge.errors import ConfigError
from tests.bridge.packed import LENGTHS, packed_rows


def samples(count: int, weight: float = 1.0) -> TokenizedDataset:
    lengths = np.random.default_rng(0).integers(3, 20, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights = np.full(offsets[-1], weight, dtype=np.float32)
    weights[offsets[:-1]] = 0
    return TokenizedDataset(np.arange(offsets[-1], dtype=np.int32), weights, offsets)


def as_their_sampler(rows, cut: Cut, rank: int, first: int, steps: int):
    """Micro-batches of a rank from row ``first`` on, dealt as MegatronPretrainingSampler deals."""
    width = cut.micro_batch_size * cut.data_parallel
    for start in range(first, first + steps * cut.global_batch_size, width):
        mine = range(start + rank * cut.micro_batch_size, start + (rank + 1) * cut.micro_batch_size)
        yield torch.utils.data.default_collate([rows[index] for index in mine])


@pytest.mark.parametrize("ranks, micro", [(1, 2), (2, 1), (2, 2)])
def test_training_rows_are_the_core_engines_batches(ranks, micro):
    data, cut = samples(11), Cut(micro, 4, ranks, seq_length=32, pad_id=0, pad_to="longest", multiple_of=2)
    rows = TrainingRows(data, cut, seed=3, shuffle=True)
    for rank in range(ranks):
        loader = WholeLoader(data, 3)
        shape = BatchShape(micro, rank, ranks, pad_id=0, seq_length=32, multiple_of=2)
        wanted = [batch for _ in range(6) for batch in microbatches(loader.next(4), shape)]  # more than two epochs
        found = list(as_their_sampler(rows, cut, rank, 0, 6))
        assert len(found) == len(wanted)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        again = list(as_their_sampler(TrainingRows(data, cut, 3, True), cut, rank, 12, 3))  # resumed after three steps
        assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(again, found[len(found) // 2 :], strict=True))


def test_an_evaluation_sees_every_sequence_once():
    data, cut = samples(11), Cut(1, 4, 2, seq_length=32, pad_id=0, pad_to="longest", multiple_of=1)
    rows = ValidationRows(data, cut, eval_iters=None)
    assert rows.steps == 3
    for evaluation in range(2):
        seen: list[int] = []
        for rank in range(2):
            for batch in as_their_sampler(rows, cut, rank, evaluation * 12, 3):
                seen += batch["labels"][batch["loss_mask"] > 0].tolist()
        assert sorted(seen) == sorted(data.ids[data.loss_weights > 0].tolist())
    assert ValidationRows(data, cut, eval_iters=1).steps == 1


def test_a_packed_row_says_where_its_documents_end():
    row = packed_rows()[0]
    first, second = (length - 1 for length in LENGTHS[2:])  # of a step the longest comes first
    assert row["cu_seqlens"].tolist() == [0, first, first + second, 12] and row["max_seqlen"] == first
    assert row["cu_seqlens_argmin"] == 4 and row["loss_mask"].tolist() == [1.0] * 8 + [0.0] * 4
    assert row["position_ids"].tolist()[:8] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_tokens_that_count_in_part_are_refused():
    check_whole_weights(samples(3), "training")
    with pytest.raises(ConfigError, match="the training data has tokens of weight 0.5, and engine bridge"):
        check_whole_weights(samples(3, 0.5), "training")
