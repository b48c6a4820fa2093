"""The gated MLP of the local layer spec: Megatron's linears around a SwiGLU that keeps only its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP


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


class GatedMLP(MLP):
    """megatron.core's MLP with the forward pass of a SwiGLU; parameters, names and sharding are the parent's."""

    def forward(self, hidden_states: torch.Tensor, per_token_scale=None, **unused):
        """[s, b, h] -> ([s, b, h], bias or None)."""
        hidden, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(_SwiGLU.apply(hidden if bias is None else hidden + bias))
