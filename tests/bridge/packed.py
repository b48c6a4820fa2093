"""A tiny packed data set as the engine's rows."""

from __future__ import annotations

import numpy as np

from primus_bridge.bridge.samples import Cut, TrainingRows
from primus_bridge.data.store import TokenizedDataset

LENGTHS = (5, 4, 7, 3)
"""Tokens of the samples: each has one input less."""


def packed_rows() -> TrainingRows:
    """Two packs, of samples 0 and 1, and 2 and 3, in sequences of 12 tokens."""
    offsets = np.cumsum([0, *LENGTHS])
    weights = np.ones(offsets[-1], dtype=np.float32)
    weights[offsets[:-1]] = 0
    data = TokenizedDataset(
        np.arange(offsets[-1], dtype=np.int32), weights, offsets, None, np.arange(4), np.array([0, 2, 4])
    )
    cut = Cut(1, 2, 1, seq_length=12, pad_id=99, pad_to="seq_length", multiple_of=1)
    return TrainingRows(data, cut, seed=1, shuffle=False)
