"""RMSNorm that knows sequence parallelism (megatron.core's torch norm refuses it) and takes few passes over memory."""

from __future__ import annotations

import torch


class _RMSNorm(torch.autograd.Function):
    """In fp32 inside, as transformers computes it; only the input (in its own dtype) and a number a row are kept.

    torch's own norm is a chain of seven operations on a CPU, each with a saved tensor and a backward of its own.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        normed = wide * rstd if wide is x else wide.mul_(rstd)
        return normed.mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[:2]
        normed = x.float() * rstd
        grad = grad.float()
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if want_weight else None
        if not want_x:
            return None, grad_weight, None
        # d/dx of x / rms: the part of the gradient along x itself drops out
        along = torch.mv(product.flatten(0, -2), weight.float()).div_(x.shape[-1]).view(rstd.shape)
        grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Signature as Megatron's layer specs call it. Under sequence parallelism each tensor-parallel rank sees its part of
    the sequence, so the weight's gradient is summed over them: Megatron does it for parameters so marked.
    Source: Zhang and Sennrich 2019.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)
