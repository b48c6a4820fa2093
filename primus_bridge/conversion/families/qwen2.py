"""Qwen2 and Qwen2.5, dense: biases on q, k and v."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.common import (
    ATTENTION_WEIGHTS,
    EMBEDDING,
    MLP_WEIGHTS,
    OUTPUT,
    QKV_BIAS,
    decoder_architecture,
    no_sliding_window,
)


def architecture(config: dict[str, Any]) -> Architecture:
    no_sliding_window(config)
    return decoder_architecture(config, add_qkv_bias=True)


FAMILY = Family(
    "Qwen2, Qwen2.5", "qwen2", EMBEDDING + ATTENTION_WEIGHTS + QKV_BIAS + MLP_WEIGHTS + OUTPUT, architecture
)
