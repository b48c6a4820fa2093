"""Packing: which samples share a sequence. Best-fit-decreasing over all of them, so that almost no place is left."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bins: the indices of the samples of each sequence, every index once.

    lengths: places that each sample takes, int [samples], 1..capacity (0 counts as 1). Samples come longest first, each
    into the fullest sequence that still has room. Deterministic: equal lengths keep their order.
    Source: Johnson 1973, BFD. The fullest fitting sequence is found in a bit set of the free places.
    """
    lengths = np.maximum(lengths, 1)
    assert not len(lengths) or int(lengths.max()) <= capacity, "a sample is longer than a sequence"
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set: some sequence has r places free
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = by_room[room]
            chosen = stack.pop()
            if not stack:
                rooms &= ~(1 << room)
            bins[chosen].append(index)
        else:
            room, chosen = capacity, len(bins)
            bins.append([index])
        room -= length
        if room:
            by_room[room].append(chosen)
            rooms |= 1 << room
    return bins
