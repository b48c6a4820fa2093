"""How many layers the first and the last pipeline stage should have for the stages to wait least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Optional

from primus_bridge.config.arguments import ModelArguments
from primus_bridge.plan.layout import Chunk, Layout, deal_layers
from primus_bridge.plan.schedule import Work, bubble, stage_work

WORTH = 0.02
"""A split is told when it saves so much of a step."""


@dataclass(frozen=True)
class Split:
    """Layers of the first and of the last stage; bubble: part of a step that the stages wait then."""

    first: int
    last: int
    bubble: float


def better_split(
    layout: Layout,
    num_layers: int,
    model: ModelArguments,
    work: Callable[[Chunk], Work],
    micro_batches: int,
    waiting: float,
) -> Optional[Split]:
    """The split of the layers whose slowest stage has the least work, if it saves WORTH of a step.

    work: what a rank does of a chunk; waiting: part of a step now. None for an interleaved schedule, whose stages are
    alike but for the output layer, as Megatron takes no other.
    """
    stages = layout.pipeline
    if stages == 1 or layout.virtual > 1 or waiting - (stages - 1) / (micro_batches + stages - 1) < WORTH:
        return None
    slowest, best = float("inf"), None
    for first, last in _ends(num_layers, stages):
        ends = replace(model, num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last)
        other = replace(layout, chunks=deal_layers(num_layers, ends))
        each = [[work(chunk)] for chunk in other.chunks]
        if max(map(stage_work, each)) < slowest:
            slowest, best = max(map(stage_work, each)), (first, last, other, each)
    if best is None:
        return None
    first, last, other, each = best
    found = Split(first, last, bubble(other, each, micro_batches))
    return found if waiting - found.bubble >= WORTH else None


def _ends(num_layers: int, stages: int) -> Iterator[tuple[int, int]]:
    """Layers of the first and the last stage that leave the stages between alike, the most even first."""
    middle, even = stages - 2, num_layers / stages
    pairs = ((first, last) for first in range(1, num_layers) for last in range(1, num_layers - first + 1))
    whole = ((first, last) for first, last in pairs if _divides(middle, num_layers - first - last))
    return iter(sorted(whole, key=lambda ends: abs(ends[0] - even) + abs(ends[1] - even)))


def _divides(middle: int, layers: int) -> bool:
    return layers == 0 if middle == 0 else layers > 0 and layers % middle == 0
