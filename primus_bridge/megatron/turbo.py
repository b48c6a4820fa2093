"""Primus-Turbo's attention and RMSNorm in place of ours, where a run asks for them, on a GPU with the package.

The kernels compute the same; what they do not take (fp32, soft caps) stays with ours. Source of the signatures:
AMD-AGI/Primus-Turbo, primus_turbo/pytorch/ops (flash_attn_func, flash_attn_varlen_func, rmsnorm).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Optional

import torch

from primus_bridge.config.arguments import BridgeArguments, ModelArguments
from primus_bridge.conversion.architecture import Architecture

SWITCHES = ("use_turbo_attention", "use_turbo_rms_norm")


def unavailable(device: Optional[str]) -> Optional[str]:
    """Why none of the kernels can be used here, on dist.device; None: they can."""
    if importlib.util.find_spec("primus_turbo") is None:
        return "the package primus_turbo is not installed"
    if device == "cpu":
        return "device is cpu"
    return None if torch.cuda.is_available() else "there is no GPU"


def kernels_wanted(model: ModelArguments) -> list[str]:
    """The switches that are on and allowed."""
    return [name for name in SWITCHES if getattr(model, name) and model.enable_primus_turbo]


def kernels_used(model: ModelArguments, device: Optional[str] = None) -> list[str]:
    """Those of them that work here. device: dist.device."""
    wanted = kernels_wanted(model)
    return wanted if wanted and unavailable(device) is None else []


def note_unused_kernels(arguments: BridgeArguments, arch: Architecture) -> None:
    """A note of the run, one for all switches that are on and change nothing, in a run of this model."""
    names = [name for name in SWITCHES if getattr(arguments.model, name)]
    reason: Optional[str] = "enable_primus_turbo is not true"
    if arguments.model.enable_primus_turbo:
        reason = unavailable(arguments.dist.device)
    if reason is None and "use_turbo_attention" in names:
        names = ["use_turbo_attention"]
        if arguments.mixed_precision == "fp32":
            reason = "their attention is of bf16, and the run of fp32"
        elif arch.attention_softcap is not None:
            reason = "their attention has no soft cap, which the model has"
    if names and reason:
        place = arguments.sources.get(f"model.{names[0]}", "default")
        listed = " and ".join(f"'{name}'" for name in names)
        verb = "have" if len(names) > 1 else "has"
        note = f"{place}: {listed} {verb} no effect here: {reason}; our own kernels are used"
        if note not in arguments.notes:
            arguments.notes.append(note)


def use_kernels(chunk: torch.nn.Module, model: ModelArguments, device: Optional[str] = None) -> None:
    """Give a model chunk the kernels that the run asks for, where they work. device: dist.device."""
    names = kernels_used(model, device)
    if names:
        put_kernels(chunk, names, importlib.import_module("primus_turbo.pytorch.ops"))


def put_kernels(chunk: torch.nn.Module, names: Sequence[str], ops: Any) -> None:
    """The kernels of ``ops`` (primus_turbo.pytorch.ops) into every attention and norm that can take them."""
    from primus_bridge.megatron.core_attention import SDPACoreAttention
    from primus_bridge.megatron.norm import RMSNorm

    for module in chunk.modules():
        if "use_turbo_attention" in names and isinstance(module, SDPACoreAttention) and module.softcap is None:
            module.flash = FlashAttention(ops, module.scale, module.window)
        if "use_turbo_rms_norm" in names and isinstance(module, RMSNorm):
            module.kernel = ops.rmsnorm


class FlashAttention:
    """Causal attention, aligned at the lower right; window: keys that a query sees, its own included."""

    def __init__(self, ops: Any, scale: float, window: Optional[int]):
        self.ops = ops
        self.options = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
        }

    def takes(self, query: torch.Tensor) -> bool:
        return query.dtype in (torch.bfloat16, torch.float16)

    def block(self, query, key, value, p: float) -> torch.Tensor:
        """[queries, b, heads, d], [keys, b, groups, d], [keys, b, groups, dv] -> [queries, b, heads, dv]."""
        q, k, v = (t.transpose(0, 1) for t in (query, key, value))
        return self.ops.flash_attn_func(q, k, v, dropout_p=p, **self.options).transpose(0, 1)

    def documents(self, query, key, value, bounds: Sequence[int], p: float) -> torch.Tensor:
        """The same of one row [s, 1, heads, d], whose documents begin at ``bounds`` and do not see each other."""
        starts = torch.tensor(bounds, dtype=torch.int32).to(query.device, non_blocking=True)
        longest = max(stop - start for start, stop in pairwise(bounds))
        q, k, v = (t.squeeze(1) for t in (query, key, value))
        out = self.ops.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, dropout_p=p, **self.options)
        return out.unsqueeze(1)
