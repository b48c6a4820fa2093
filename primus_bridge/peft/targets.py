"""Which linears get an adapter: Hugging Face names (a projection each) or Megatron's (a fused linear)."""

from __future__ import annotations

from typing import Sequence

from primus_bridge.errors import ConfigError, did_you_mean

# HF projection -> (Megatron linear, its part of the fused linear)
PROJECTIONS: dict[str, tuple[str, str]] = {
    "q_proj": ("linear_qkv", "q"),
    "k_proj": ("linear_qkv", "k"),
    "v_proj": ("linear_qkv", "v"),
    "o_proj": ("linear_proj", "o"),
    "gate_proj": ("linear_fc1", "gate"),
    "up_proj": ("linear_fc1", "up"),
    "down_proj": ("linear_fc2", "down"),
}
FUSED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
ALL_LINEAR = "all-linear"
# the whole of a linear that is not fused from several projections
WHOLE = {"linear_proj": "o", "linear_fc2": "down"}


def adapted_parts(target_modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Megatron linear -> the parts that get an adapter each; ``("fused",)`` for one adapter over the whole of it.

    Raises ConfigError for an unknown module, or one named both ways.
    """
    parts: dict[str, set[str]] = {}
    names = list(PROJECTIONS) if list(target_modules) == [ALL_LINEAR] else target_modules
    for name in names:
        if name in PROJECTIONS:
            linear, part = PROJECTIONS[name]
        elif name in FUSED:
            linear, part = name, WHOLE.get(name, "fused")
        else:
            known = [*PROJECTIONS, *FUSED, ALL_LINEAR]
            raise ConfigError(
                f"unknown target module '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}",
                where="lora_target_modules",
            )
        parts.setdefault(linear, set()).add(part)
    for linear, found in parts.items():
        if "fused" in found and len(found) > 1:
            raise ConfigError(f"'{linear}' and its projections are both named: keep one", where="lora_target_modules")
    order = [part for _, part in PROJECTIONS.values()] + ["fused"]
    return {linear: tuple(sorted(found, key=order.index)) for linear, found in parts.items()}
