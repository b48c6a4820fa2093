"""Bytes of a rank of each pipeline stage: weights, gradients, optimizer, activations, working memory.

Each part is counted from what the code allocates, not fitted: tests compare parameters with the built model, kept
activations with what autograd keeps, and the peak with that of real ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.peft.plan import AdapterPlan
from primus_bridge.plan.activations import step_memory
from primus_bridge.plan.layout import Layout
from primus_bridge.plan.operations import FP32, MicroBatch, element_bytes
from primus_bridge.plan.parameters import Parameters, chunk_parameters, numbers

ALIGNED = 64
"""Numbers to a multiple of which a parameter begins in the distributed optimizer's buffers."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage.

    activations: what is kept for the backward pass, of every micro-batch in flight. working: gradients of activations
    and what else exists for a moment at the peak. parameters, trainable: numbers, not bytes.
    """

    stage: int
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def stage_memory(
    arguments: BridgeArguments,
    family: Family,
    arch: Architecture,
    layout: Layout,
    adapters: Optional[AdapterPlan],
    cpu: bool,
    length: Optional[int] = None,
) -> list[StageMemory]:
    """Every stage's, at the peak of a step after the first (the first has no moments of Adam yet).

    cpu: gloo and torch's CPU kernels, whose temporaries differ. length: of the sequences; None: seq_length.
    """
    batch = MicroBatch.of(arguments, arch, layout, cpu, adapters, length)
    micro_batches = arguments.train.global_batch_size // (arguments.train.micro_batch_size * layout.data)
    stages = []
    for stage in range(layout.pipeline):
        chunks = [
            chunk_parameters(chunk, layout, family, arch, arguments.model.make_vocab_size_divisible_by, adapters)
            for chunk in layout.of_stage(stage)
        ]
        every = [each for chunk in chunks for each in chunk]
        weights, gradients, optimizer, updating = _states(chunks, arguments, layout, cpu)
        step = step_memory(arguments, batch, layout, stage, micro_batches)
        kept, working = step.kept, step.working
        if updating > kept + working:
            # the largest moment is not in the backward pass but after it
            kept, working = 0, updating
        stages.append(
            StageMemory(
                stage,
                numbers(every),
                numbers(every, trainable_only=True),
                weights,
                gradients,
                optimizer,
                round(kept),
                round(working),
            )
        )
    return stages


def _states(
    chunks: Sequence[Sequence[Parameters]], arguments: BridgeArguments, layout: Layout, cpu: bool
) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer, what reducing the gradients and updating needs beside), bytes."""
    element, ddp = element_bytes(arguments), arguments.ddp
    gradient = FP32 if ddp.grad_reduce_in_fp32 else element
    states = 2 * FP32 + (FP32 if element != FP32 else 0)  # Adam's moments, and the master weights of bf16
    offloaded = 0.0
    if arguments.optimizer.optimizer_cpu_offload and not cpu:  # on a CPU there is nothing to move
        offloaded = arguments.optimizer.optimizer_offload_fraction
    frozen = sum(each.total for chunk in chunks for each in chunk if not each.trainable)
    weights, gradients, optimizer, largest = frozen * element, 0, 0, 0
    for chunk in chunks:
        for expert in (False, True):
            trained = [each for each in chunk if each.trainable and each.expert == expert]
            ranks = layout.expert_data if expert else layout.data * layout.context
            size = _buffer_numbers(trained, ranks) if ddp.use_distributed_optimizer else numbers(trained)
            weights += size * element
            gradients += size * gradient
            # between aligned parameters there is nothing to keep states for
            held = min(size // ranks, numbers(trained)) if ddp.use_distributed_optimizer else size
            optimizer += round(held * states * (1 - offloaded))
            # gloo reduces in a copy of the whole buffer; a bf16 gradient is cast for the update
            copied = size * gradient if cpu and ranks > 1 else 0
            largest = max(largest, copied, held * FP32 if gradient != FP32 else 0)
    return weights, gradients, optimizer, largest


def _buffer_numbers(trained: Sequence[Parameters], ranks: int) -> int:
    """Numbers of a buffer of the distributed optimizer: each parameter aligned, each bucket divisible by the ranks."""
    divisor = math.lcm(ranks, 128)
    size = shared = 0
    for each in trained:
        aligned = each.count * (-(-each.size // ALIGNED) * ALIGNED)
        size, shared = (size, shared + aligned) if each.alone else (size + aligned, shared)
    return sum(-(-part // divisor) * divisor for part in (size, shared))
