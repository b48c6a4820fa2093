"""Activations and working memory of a pipeline stage at the peak of a step, over its layers and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from primus_bridge.config.arguments import BridgeArguments, ModelArguments
from primus_bridge.plan.attention import visible_window
from primus_bridge.plan.layer import layer_work
from primus_bridge.plan.layout import Chunk, Layout
from primus_bridge.plan.linear import weight_gradient
from primus_bridge.plan.operations import FP32, MicroBatch, Work
from primus_bridge.plan.output import output
from primus_bridge.plan.schedule import in_flight


@dataclass(frozen=True)
class Step:
    """Bytes at the peak: kept for the backward pass, and what else exists then."""

    kept: float
    working: float


def step_memory(arguments: BridgeArguments, batch: MicroBatch, layout: Layout, stage: int, micro_batches: int) -> Step:
    """The largest moment of forward and backward passes on a rank of the stage."""
    model = arguments.model
    chunks = {chunk.number: chunk for chunk in layout.of_stage(stage)}
    works = {number: [layer_work(batch, layer) for layer in chunk.layers] for number, chunk in chunks.items()}
    moments = {number: _moments(chunk, works[number], batch, model) for number, chunk in chunks.items()}
    always = _buffers(batch, chunks.values())
    best = Step(0, 0)
    for held in in_flight(layout, stage, micro_batches):
        waiting = sum(count * moments[number].kept for number, count in held.items())
        for number, count in held.items():
            # the backward pass that begins is that of one micro-batch of one of these chunks
            if count:
                step = Step(waiting, moments[number].peak - moments[number].kept + always)
                best = max(best, step, key=lambda each: each.kept + each.working)
    return best


def _moments(chunk: Chunk, works: Sequence[Work], batch: MicroBatch, model: ModelArguments) -> Work:
    """What a micro-batch keeps in a chunk, and the most that exists while it is run backward through it."""
    groups = _recomputed(chunk, works, batch, model)
    kept = sum(group.kept for group in groups)
    if batch.layout.pipeline > 1:
        # the schedule holds what a chunk put out until its gradient has come
        kept += 0 if chunk.output else batch.stream
    peak, left, after = kept, kept, 0.0
    if chunk.output:
        arch = batch.arch
        padded = arch.padded_vocab_size(model.make_vocab_size_divisible_by, batch.layout.tensor)
        end = output(batch, padded, arch.tied_embeddings and chunk.embedding)
        peak = kept + max(end.forward, end.backward)
        kept, after = kept + end.kept, end.after
    # from the last layer to the first, each with the gradient that comes to it
    for group in reversed(groups):
        peak = max(peak, left + after + group.peak - group.kept)
        left -= group.kept
    if chunk.embedding and batch.full:
        peak = max(peak, left + 2 * after, left + after + _embedding_gradient(batch, model))
    return Work(kept, peak)


def _embedding_gradient(batch: MicroBatch, model: ModelArguments) -> int:
    padded = batch.arch.padded_vocab_size(model.make_vocab_size_divisible_by, batch.layout.tensor)
    return weight_gradient(batch, padded // batch.layout.tensor * batch.arch.hidden_size)


def _recomputed(chunk: Chunk, works: Sequence[Work], batch: MicroBatch, model: ModelArguments) -> list[Work]:
    """The layers as they are kept: recompute keeps only the input of a layer, or of several in a row.

    The peak of a recomputed group is that of its last layer, after all of them have run again.
    """
    layers = list(works)
    if model.recompute_granularity != "full":
        return layers
    number = model.recompute_num_layers or 1
    if model.recompute_method == "block":
        # the first ones of the chunk are made again, each alone
        return [Work(batch.stream, work.peak) if at < number else work for at, work in enumerate(layers)]
    groups = [layers[start : start + number] for start in range(0, len(layers), number)]
    return [
        Work(batch.stream, sum(work.kept for work in group[:-1]) + group[-1].peak if group else 0) for group in groups
    ]


def _buffers(batch: MicroBatch, chunks) -> float:
    """What stays allocated from the first micro-batch on: the gathered input of sequence-parallel linears, and the
    largest mask of windows and soft caps."""
    arch = batch.arch
    gathered = batch.positions * arch.hidden_size * batch.element if batch.layout.sequence_parallel else 0
    windows = [visible_window(batch, layer) for chunk in chunks for layer in chunk.layers]
    seen = max((window for window in windows if window is not None), default=0)
    mask = max(seen, 128) * (2 * max(seen, 128)) * batch.element if seen else 0
    if arch.attention_softcap is not None:
        mask = max(mask, min(batch.length, 1024) * batch.length * FP32)
    return gathered + mask
