"""The operations of one transformer layer, as megatron/layer.py, attention.py, mlp.py and moe.py run them."""

from __future__ import annotations

from collections.abc import Sequence

from primus_bridge.plan.attention import attention
from primus_bridge.plan.linear import Linears
from primus_bridge.plan.moe import experts, shared_experts
from primus_bridge.plan.operations import FP32, MicroBatch, Operation, Work, backward


def layer_work(batch: MicroBatch, layer: int) -> Work:
    """A layer (from 0) of one micro-batch on one rank; its input counts, its output is the next one's."""
    arch = batch.arch
    linears = Linears(batch, layer)
    before, after = arch.residual != "post", arch.residual in ("post", "sandwich")
    normed = "normed input" if before else "layer input"
    middle = "layer input" if arch.residual.startswith("parallel") else "after attention"
    operations: list[Operation] = []
    if before:
        operations.append(norm(batch, "layer input"))
    operations += attention(linears, normed)
    operations += _end_of_branch(batch, "attended", after)
    mlp_input = middle
    if arch.residual == "parallel one norm":
        mlp_input = normed
    elif before:
        operations.append(norm(batch, middle))
        mlp_input = "normed middle"
    if arch.has_experts(layer):
        operations += shared_experts(linears, mlp_input)
        operations += experts(linears, mlp_input)
    else:
        operations += dense_mlp(linears, mlp_input)
    operations += _end_of_branch(batch, "mlp output", after)
    return backward(operations, held=batch.stream)


def norm(batch: MicroBatch, of: str) -> Operation:
    """RMSNorm or LayerNorm over the residual stream: it keeps its input and a number or two a position."""
    arch, numbers = batch.arch, batch.stream_positions * batch.arch.hidden_size
    statistics = batch.stream_positions * FP32 * (1 if arch.norm == "rms" else 2)
    return Operation(
        keeps={of: batch.stream, f"statistics of {of}": statistics},
        gradient_in=batch.stream,
        gradient_out=batch.stream,
        scratch=norm_scratch(arch.norm == "rms", numbers, batch.element),
    )


def norm_scratch(rms: bool, numbers: int, element: int) -> int:
    """Our RMSNorm's backward pass is a few operations in fp32; torch's LayerNorm is one kernel."""
    if not rms:
        return 0
    # the normed input and its product with the gradient; below fp32 the gradient and the result in fp32 as well
    return numbers * FP32 * (2 if element == FP32 else 4)


def _end_of_branch(batch: MicroBatch, name: str, normed: bool) -> list[Operation]:
    """Dropout before the residual sum, and a norm where the architecture has one there."""
    operations = []
    if batch.hidden_dropout:
        # torch's CPU dropout multiplies by a mask of the input's dtype, the GPU's keeps a byte a number
        size = batch.stream if batch.cpu else batch.stream // batch.element
        operations.append(Operation({f"mask of {name}": size}, batch.stream, batch.stream))
    if normed:
        operations.append(norm(batch, name))
    return operations


def dense_mlp(linears: Linears, source: str) -> list[Operation]:
    """linear_fc1, the activation, linear_fc2."""
    batch, arch = linears.batch, linears.batch.arch
    width = arch.ffn_hidden_size // batch.layout.tensor
    return [
        linears.column("mlp.linear_fc1", source, arch.hidden_size, width * (2 if arch.gated_mlp else 1), "fc1 output"),
        *activation(batch, batch.positions, width),
        linears.row("mlp.linear_fc2", "activated", width, arch.hidden_size),
    ]


def activation(batch: MicroBatch, positions: float, width: int) -> Sequence[Operation]:
    """silu(gate) * up in one function that keeps its input; another gated activation keeps its factors as well."""
    arch, size = batch.arch, positions * width * batch.element
    if not arch.gated_mlp:
        return [Operation({"fc1 output": size}, size, size)]
    if arch.activation == "silu":
        return [Operation({"fc1 output": 2 * size}, 2 * size, size, scratch=size)]
    return [Operation({"fc1 output": 2 * size, "gate": size}, 2 * size, size, scratch=2 * size)]
