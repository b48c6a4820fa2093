"""Megatron's pipeline schedules: which micro-batches a stage holds at once, and the part of the time it waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from primus_bridge.plan.layout import Layout


def bubble(layout: Layout, micro_batches: int) -> float:
    """Part of a step in which a stage waits for others: (p - 1) / (m v + p - 1).

    Source: Narayanan et al. 2021, section 2.2, where it is the same over the time of the work.
    """
    waiting = layout.pipeline - 1
    return waiting / (micro_batches * layout.virtual + waiting)


def in_flight(layout: Layout, stage: int, micro_batches: int) -> list[Counter[int]]:
    """Each set of micro-batches, as counts by chunk, whose activations a stage holds when a backward pass begins.

    Without a pipeline it is one; with one forward and one backward in turn (1F1B) a stage holds as many as there are
    stages from it on; interleaved, those of its chunks as well. Only the largest sets are listed.
    """
    if layout.pipeline == 1:
        return [Counter({0: 1})]
    order = list(_forward_order(layout, micro_batches))
    waiting = layout.pipeline - stage - 1
    warmup = waiting if layout.virtual == 1 else 2 * waiting + (layout.virtual - 1) * layout.pipeline
    warmup = min(warmup, len(order))
    # backward goes through the chunks in the opposite order
    backward = [layout.virtual - 1 - chunk for chunk in order]
    held = Counter(order[:warmup])
    sets: list[Counter[int]] = []
    for step, chunk in enumerate(order[warmup:]):
        held[chunk] += 1
        if held not in sets:
            sets.append(held.copy())
        held[backward[step]] -= 1
    return sets or [held]


def _forward_order(layout: Layout, micro_batches: int) -> Iterator[int]:
    """Chunk of each forward pass of a stage: ``pipeline`` micro-batches through a chunk, then through the next."""
    for first in range(0, micro_batches, layout.pipeline):
        group = min(layout.pipeline, micro_batches - first)
        for chunk in range(layout.virtual):
            yield from [chunk] * group
