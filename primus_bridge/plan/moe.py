"""Mixture of experts as operations: megatron.core's all-to-all dispatch and one MLP an expert.

Tokens are taken to be spread evenly over the experts; how far a router is from that is not known before the run.
"""

from __future__ import annotations

from primus_bridge.plan.linear import Linears, weight_gradient
from primus_bridge.plan.operations import FP32, MicroBatch, Operation


def experts(linears: Linears, source: str) -> list[Operation]:
    """Router, dispatch, the experts, and back."""
    batch, arch = linears.batch, linears.batch.arch
    moe = arch.moe
    assert moe is not None
    stream, element, hidden = batch.stream_positions, batch.element, arch.hidden_size
    width = moe.ffn_hidden_size // batch.layout.expert_tensor
    # ranks that split the same expert all see its tokens
    tokens = stream * moe.top_k * batch.layout.expert_tensor
    dispatched, inner = tokens * hidden * element, tokens * width * element
    router: dict[str, float] = {"router's scores": stream * moe.num_experts * FP32 * 3}
    if batch.full:
        # the router computes in fp32
        router |= {"router's input" if element != FP32 else source: stream * hidden * FP32}
    keeps: dict[str, float] = {"experts' fc1 output": 2 * inner, "experts' gate": inner, "experts' up": inner}
    # the product of both is kept for the gradient of the weights of the choice, which come in fp32
    keeps["experts' product"] = inner
    local = moe.num_experts // batch.layout.expert
    operations = [
        Operation(router, batch.stream, batch.stream),
        Operation({}, batch.stream, dispatched, scratch=dispatched),
    ]
    if batch.full:
        one = weight_gradient(batch, 2 * width * hidden)
        operations += [
            Operation({"dispatched": dispatched}, dispatched, 2 * inner / local, weight=one),
            Operation(keeps, 2 * inner / local, inner / local, scratch=2 * inner / local),
            Operation({"experts' weighted product": inner}, inner / local, dispatched, weight=one),
        ]
    else:
        operations += [
            Operation({}, dispatched, 2 * inner / local),
            Operation(keeps, 2 * inner / local, inner / local, scratch=2 * inner / local),
            Operation({}, inner / local, dispatched),
        ]
    operations.append(Operation({}, dispatched, batch.stream, scratch=dispatched))
    return operations


def shared_experts(linears: Linears, source: str) -> list[Operation]:
    """The MLP that every token goes through beside its experts."""
    batch, moe = linears.batch, linears.batch.arch.moe
    assert moe is not None
    if not moe.shared_ffn_hidden_size:
        return []
    hidden, width = batch.arch.hidden_size, moe.shared_ffn_hidden_size // batch.layout.tensor
    size = batch.positions * width * batch.element
    operations = [
        linears.column("mlp.shared_experts.linear_fc1", source, hidden, 2 * width, "shared fc1 output"),
        Operation(
            {"shared fc1 output": 2 * size, "shared gate": size, "shared up": size}, 2 * size, size, scratch=2 * size
        ),
        linears.row("mlp.shared_experts.linear_fc2", "shared activated", width, hidden),
    ]
    if moe.shared_gate:
        operations.append(_gate(batch, source))
    return operations


def _gate(batch: MicroBatch, source: str) -> Operation:
    keeps: dict[str, float] = {"shared output": batch.stream}
    if batch.full:
        keeps[source] = batch.stream
    return Operation(keeps, batch.stream, batch.stream)
