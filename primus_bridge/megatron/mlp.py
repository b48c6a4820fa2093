"""The MLP of the local layer spec: Megatron's linears around an activation; a SwiGLU keeps only its input."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer import mlp as mcore_mlp

from primus_bridge.conversion.architecture import Architecture

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., gate | up]; the gradient is written into one buffer, not joined from two."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
        return out


class MLP(mcore_mlp.MLP):
    """megatron.core's MLP with a forward pass of its own; parameters, names and sharding are the parent's."""

    def __init__(self, config, submodules, arch: Architecture, **options):
        config = copy.copy(config)
        config.add_bias_linear = arch.mlp_bias
        super().__init__(config, submodules, **options)
        self.swiglu = arch.gated_mlp and arch.activation == "silu"

    def forward(self, hidden_states: torch.Tensor, **unused):
        """[s, b, h] -> ([s, b, h], bias or None)."""
        hidden, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            hidden = hidden + bias
        if self.swiglu:
            return self.linear_fc2(_SwiGLU.apply(hidden))
        if self.config.gated_linear_unit:
            gate, up = hidden.chunk(2, dim=-1)
            return self.linear_fc2(self.config.activation_func(gate) * up)
        return self.linear_fc2(self.config.activation_func(hidden))
