"""Seeded numbers and orders that stay the same for ever: a resumed run must meet the same samples after an upgrade."""

from __future__ import annotations

import numpy as np


def seeded_numbers(count: int, *key: int) -> np.ndarray:
    """uint64 [count], a pure function of the key; fewer of them are the first of more."""
    # numpy promises the raw stream of a bit generator for ever, but not that of Generator.permutation
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(max(count, 1))[:count]


def seeded_order(count: int, *key: int) -> np.ndarray:
    """A permutation of 0..count-1, int64 [count], by the key."""
    return np.argsort(seeded_numbers(count, *key), kind="stable")
