"""The documents of a micro-batch: where each one lies, in its own row or packed one after the other into one row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Optional

import torch


@dataclass(frozen=True)
class Span:
    """Positions start..stop-1 of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Documents:
    """Known on the host, so that neither attention nor noise waits for a device.

    spans: one a document, in the order of the batch, padding left out; a row without a document may have an empty one,
    and evaluation may have a packed row of padding only. packed: all lie in row 0, and none may see
    another; else one lies in each row, and a right-padded row needs no bounds. noise_seeds: one a document, or none.
    """

    spans: tuple[Span, ...]
    packed: bool
    noise_seeds: tuple[int, ...] = ()

    def bounds(self, length: int) -> list[int]:
        """Where attention begins anew in rows of ``length`` positions, and their end; padding is a document more."""
        ends = {end for span in self.spans for end in (span.start, span.stop)} if self.packed else set()
        return sorted({0, length} | ends)


def documents_of(batch: dict[str, torch.Tensor]) -> Optional[Documents]:
    """The documents that a micro-batch tells of; None where its rows are all that matters.

    batch: cu_seqlens int32 [documents + 1] when packed, from 0, at most the row's length; noise_seeds int64
    [documents], and beside it, unpacked, lengths int64 [b].
    """
    seeds = tuple(batch["noise_seeds"].tolist()) if "noise_seeds" in batch else ()
    if "cu_seqlens" in batch:
        spans = tuple(Span(0, start, stop) for start, stop in pairwise(batch["cu_seqlens"].tolist()))
        return Documents(spans, True, seeds)
    if not seeds:
        return None
    return Documents(tuple(Span(row, 0, n) for row, n in enumerate(batch["lengths"].tolist())), False, seeds)
