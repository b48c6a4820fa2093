"""Packing: every sample once, no sequence too full, and almost no place left."""

from __future__ import annotations

import numpy as np
import pytest

from primus_bridge.data.packing import pack


def check(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    bins = pack(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(0 < sum(max(1, lengths[i]) for i in members) <= capacity for members in bins)
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_random_lengths(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 200))
    check(rng.integers(0, capacity + 1, int(rng.integers(0, 300))), capacity)


def test_best_fit_takes_the_fullest_sequence_that_has_room():
    # 6 and 5 open sequences with 4 and 5 places; 4 fits the first exactly, where worst fit would take the second
    assert pack(np.array([6, 5, 4, 5]), 10) == [[0, 2], [1, 3]]


def test_it_is_deterministic_and_keeps_file_order_among_equals():
    assert pack(np.array([5, 5, 5, 5]), 10) == [[0, 1], [2, 3]]


def test_no_samples():
    assert pack(np.array([], dtype=np.int64), 8) == []


def test_alpaca_like_lengths_leave_less_than_one_in_two_hundred_places():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(90), 0.7, 20_000).astype(int), 8, 2048)
    bins = check(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.995


def test_too_long_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="longer"):
        pack(np.array([9]), 8)
