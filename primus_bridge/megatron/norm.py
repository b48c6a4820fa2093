"""RMSNorm that knows sequence parallelism (megatron.core's torch norm refuses it)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in fp32 inside the kernel.

    Signature as Megatron's layer specs call it. Under sequence parallelism each tensor-parallel rank sees its part of
    the sequence, so the weight's gradient is summed over them: Megatron does it for parameters so marked.
    Source: Zhang and Sennrich 2019.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.hidden_size,), self.weight, self.eps)
