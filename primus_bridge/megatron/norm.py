"""RMSNorm and LayerNorm that know sequence and tensor parallelism, and take few passes over memory.

megatron.core's torch norm refuses sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class _RMSNorm(torch.autograd.Function):
    """In fp32 inside, as transformers computes it; only the input (in its own dtype) and a number a row are kept.

    torch's own norm is a chain of seven operations on a CPU, each with a saved tensor and a backward of its own.
    ``offset`` is added to the weight.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        normed = wide * rstd if wide is x else wide.mul_(rstd)
        return normed.mul_(weight.float() + offset if offset else weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[:2]
        normed = x.float() * rstd
        grad = grad.float()
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if want_weight else None
        if not want_x:
            return None, grad_weight, None, None
        scale = weight.float() + ctx.offset
        # d/dx of x / rms: the part of the gradient along x itself drops out
        along = torch.mv(product.flatten(0, -2), scale).div_(x.shape[-1]).view(rstd.shape)
        grad_x = (grad * scale).addcmul_(normed, along, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None, None


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; weight + 1 with layernorm_zero_centered_gamma.

    Signature as Megatron's layer specs call it. Under sequence parallelism each tensor-parallel rank sees its part of
    the sequence, so the weight's gradient is summed over them: Megatron does it for parameters so marked.
    Source: Zhang and Sennrich 2019.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        # Primus-Turbo's rmsnorm(x, weight, eps), where turbo.py puts it
        self.kernel: Optional[Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel is not None:
            return self.kernel(x, self.weight + self.offset if self.offset else self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps, self.offset)


class LayerNorm(torch.nn.Module):
    """(x - mean) / std * weight + bias over the last dimension; signature and marks as RMSNorm.

    Source: Ba et al. 2016.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _SumOverRanks(torch.autograd.Function):
    """The sum over the group, of which every rank goes on to use its own part: gradients are summed as well."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class SplitRMSNorm(torch.nn.Module):
    """RMSNorm over a dimension that is split over the tensor-parallel ranks: all heads of q, or of k, together."""

    def __init__(self, size: int, eps: float, group):
        super().__init__()
        self.eps, self.group, self.size = eps, group, size
        self.weight = torch.nn.Parameter(torch.ones(size // group.size()))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size / tp], this rank's heads."""
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.group)
        # as transformers: rounded to the input's dtype before the weight
        return self.weight * (wide * torch.rsqrt(squares / self.size + self.eps)).to(x.dtype)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {"weight": 0}, sharded_offsets)
