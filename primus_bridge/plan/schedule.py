"""Megatron's pipeline schedules: which micro-batches a stage holds at once, and the part of the time it waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from primus_bridge.plan.layout import Layout


class Pass(NamedTuple):
    """Of a micro-batch through a chunk of a stage."""

    backward: bool
    chunk: int
    micro_batch: int


STEADY = 8
"""After so many micro-batches a stage each later one takes as long as the one before it."""


class Work(NamedTuple):
    """Of a chunk: how long a micro-batch's passes through it take, in any unit."""

    forward: float
    backward: float


def bubble(layout: Layout, work: Sequence[Sequence[Work]], micro_batches: int) -> float:
    """Part of a step in which stages wait for others, on their mean: the schedule run through, passing on for nothing.

    work: of each chunk of each stage. For chunks alike it comes to (p - 1) / (m v + p - 1) (Narayanan et al. 2021,
    section 2.2).
    """
    if layout.pipeline == 1:
        return 0.0
    run = min(micro_batches, STEADY * layout.pipeline + micro_batches % layout.pipeline)
    time = _step_time(layout, work, run)
    if run < micro_batches:
        period = layout.pipeline
        time += (micro_batches - run) / period * (time - _step_time(layout, work, run - period))
    return 1 - micro_batches * sum(map(stage_work, work)) / (layout.pipeline * time)


def stage_work(chunks: Sequence[Work]) -> float:
    """How long both passes of a micro-batch through all chunks of a stage take."""
    return sum(map(sum, chunks))


def _step_time(layout: Layout, work: Sequence[Sequence[Work]], micro_batches: int) -> float:
    """When the last pass of a step ends."""
    stages = range(layout.pipeline)
    passes = [_passes(layout, stage, micro_batches) for stage in stages]
    ends: dict[tuple[int, Pass], float] = {}
    clocks, done = [0.0 for _ in stages], [0 for _ in stages]
    while any(done[stage] < len(passes[stage]) for stage in stages):
        for stage in stages:
            for one in passes[stage][done[stage] :]:
                before = _before(layout, stage, one)
                if before is not None and before not in ends:
                    break
                begin = max(clocks[stage], ends[before] if before is not None else 0.0)
                clocks[stage] = begin + work[stage][one.chunk][one.backward]
                ends[stage, one] = clocks[stage]
                done[stage] += 1
    return max(clocks)


def _passes(layout: Layout, stage: int, micro_batches: int) -> list[Pass]:
    """What a stage does, in order: forward passes to warm up, then one forward and one backward in turn."""
    order = list(_forward_order(layout, micro_batches))
    forward = [Pass(False, chunk, number) for chunk, number in order]
    # backward goes through the chunks in the opposite order
    backward = [Pass(True, layout.virtual - 1 - chunk, number) for chunk, number in order]
    warmup = _warmup(layout, stage, len(order))
    turns = [one for both in zip(forward[warmup:], backward, strict=False) for one in both]
    return forward[:warmup] + turns + backward[len(order) - warmup :]


def _before(layout: Layout, stage: int, one: Pass) -> Optional[tuple[int, Pass]]:
    """The pass, and its stage, whose result a pass begins with; None for the first of a micro-batch."""
    last = layout.pipeline - 1
    if not one.backward:
        if stage > 0:
            return stage - 1, one
        return (last, one._replace(chunk=one.chunk - 1)) if one.chunk > 0 else None
    if stage < last:
        return stage + 1, one
    if one.chunk < layout.virtual - 1:
        return 0, one._replace(chunk=one.chunk + 1)
    return stage, one._replace(backward=False)


def in_flight(layout: Layout, stage: int, micro_batches: int) -> list[Counter[int]]:
    """Each set of micro-batches, as counts by chunk, whose activations a stage holds when a backward pass begins.

    Without a pipeline it is one; with one forward and one backward in turn (1F1B) a stage holds as many as there are
    stages from it on; interleaved, those of its chunks as well. Only the largest sets are listed.
    """
    if layout.pipeline == 1:
        return [Counter({0: 1})]
    order = [chunk for chunk, _ in _forward_order(layout, micro_batches)]
    warmup = _warmup(layout, stage, len(order))
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


def _warmup(layout: Layout, stage: int, passes: int) -> int:
    """Forward passes of a stage before its first backward pass, but the one that comes right before it."""
    waiting = layout.pipeline - stage - 1
    return min(waiting if layout.virtual == 1 else 2 * waiting + (layout.virtual - 1) * layout.pipeline, passes)


def _forward_order(layout: Layout, micro_batches: int) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch) of a stage's forward passes: ``pipeline`` micro-batches through a chunk, then the next."""
    for first in range(0, micro_batches, layout.pipeline):
        group = range(first, min(first + layout.pipeline, micro_batches))
        for chunk in range(layout.virtual):
            yield from ((chunk, number) for number in group)
