"""Megatron's fallback optimizer, without Transformer Engine and apex: torch's AdamW in its fused form.

The unfused one takes five passes over the parameters on a CPU, and a kernel a parameter on a GPU.
"""

from __future__ import annotations

import functools

from primus_bridge.patches.megatron_core_without_gpu_kernels import installed

from primus_bridge.patching import Patch


def _needed(device: str) -> tuple[bool, str]:
    if device == "cpu":
        return True, "no Transformer Engine or apex on a CPU"
    for name in installed():
        return False, f"{name} brings its own fused Adam"
    return True, "neither transformer_engine nor apex is installed"


class _FusedOptim:
    """Stands where ``torch.optim`` is named inside megatron.core.optimizer; everything else passes through."""

    def __init__(self, optim):
        self._optim = optim
        self.AdamW = functools.partial(optim.AdamW, fused=True)
        self.Adam = functools.partial(optim.Adam, fused=True)

    def __getattr__(self, name):
        return getattr(self._optim, name)


class _Torch:
    def __init__(self, torch):
        self._torch = torch
        self.optim = _FusedOptim(torch.optim)

    def __getattr__(self, name):
        return getattr(self._torch, name)


def _apply() -> None:
    import megatron.core.optimizer as optimizer
    import torch

    if optimizer.torch is torch:
        optimizer.torch = _Torch(torch)


PATCH = Patch(
    id="megatron-core-fused-adamw",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="without Transformer Engine or apex megatron.core steps with an unfused AdamW",
    remove_when="megatron.core passes fused=True to torch.optim.AdamW",
    condition=_needed,
    apply=_apply,
    order=60,
)
