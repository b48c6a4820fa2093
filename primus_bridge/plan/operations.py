"""Operations of a micro-batch as the memory planner sees them: what each keeps for its backward pass, and needs there.

An operation is a linear, a norm, an attention, ...: the tensors that it keeps from the forward pass to the backward
pass, by name (two operations may keep the same one), and what exists beside them while its backward pass runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.peft.plan import AdapterPlan
from primus_bridge.plan.layout import Layout

FP32 = 4
"""Bytes of an fp32 number."""


@dataclass(frozen=True)
class Operation:
    """Bytes; ``keeps``: name of a tensor -> its bytes. gradient_in, gradient_out: of its input and its output.

    weight: the gradient of its weights, with its conversion to the buffer's dtype. scratch: other tensors of its
    backward pass.
    """

    keeps: dict[str, float] = field(default_factory=dict)
    gradient_in: float = 0
    gradient_out: float = 0
    weight: float = 0
    scratch: float = 0


@dataclass(frozen=True)
class Work:
    """kept: bytes from the forward to the backward pass. peak: the most that exists while it goes backward, of kept
    tensors that are still there and of gradients."""

    kept: float = 0
    peak: float = 0


def backward(operations: Sequence[Operation], held: float = 0) -> Work:
    """Go backward through operations that follow each other; a kept tensor goes with the first that kept it.

    held: what exists all the time beside them (the gradient of the residual stream).
    """
    kept: dict[str, float] = {}
    for operation in operations:
        kept.update(operation.keeps)
    total = left = sum(kept.values())
    peak = total + held
    for index in reversed(range(len(operations))):
        now = operations[index]
        gradients = now.gradient_in + now.gradient_out + now.weight + now.scratch
        peak = max(peak, left + held + gradients)
        earlier = {name for operation in operations[:index] for name in operation.keeps}
        left -= sum(size for name, size in now.keeps.items() if name not in earlier)
    return Work(total, peak)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch on one rank, with what decides how much of it is kept.

    rows, length: [b, s] of the whole sequences; packed: one row of documents. cpu: kernels differ, and so does what
    they keep. adapters: None: all weights are trained.
    """

    arch: Architecture
    layout: Layout
    rows: int
    length: int
    packed: bool
    element: int
    """Bytes of a number of an activation."""
    cpu: bool
    attention_dropout: bool
    hidden_dropout: bool
    adapter_dropout: bool
    selective: bool
    adapters: Optional[AdapterPlan]

    @classmethod
    def of(
        cls,
        arguments: BridgeArguments,
        arch: Architecture,
        layout: Layout,
        cpu: bool,
        adapters: Optional[AdapterPlan],
        length: Optional[int] = None,
    ) -> MicroBatch:
        """length: of its sequences; None: seq_length, the longest that they may be."""
        model, train, packed = arguments.model, arguments.train, arguments.dataset.packed_sequence
        length = length or model.seq_length
        return cls(
            arch=arch,
            layout=layout,
            rows=1 if packed else train.micro_batch_size,
            length=length * train.micro_batch_size if packed else length,
            packed=packed,
            element=element_bytes(arguments),
            cpu=cpu,
            attention_dropout=model.attention_dropout > 0,
            hidden_dropout=model.hidden_dropout > 0,
            adapter_dropout=arguments.peft.dropout > 0,
            selective=model.recompute_granularity == "selective",
            adapters=adapters,
        )

    @property
    def positions(self) -> int:
        """Positions that the rank computes on between the tensor-parallel communications."""
        return self.rows * self.length // self.layout.context

    @property
    def stream_positions(self) -> int:
        """Those of the residual stream, which sequence parallelism shards."""
        return self.positions // self.layout.tensor if self.layout.sequence_parallel else self.positions

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.stream_positions * self.arch.hidden_size * self.element

    @property
    def full(self) -> bool:
        return self.adapters is None


def element_bytes(arguments: BridgeArguments) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if arguments.mixed_precision == "bf16_mixed" else FP32
