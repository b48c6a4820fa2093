"""Qwen3, dense: RMSNorm on q and k, and a head size of its own."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.common import (
    ATTENTION_WEIGHTS,
    EMBEDDING,
    MLP_WEIGHTS,
    OUTPUT,
    QK_NORM,
    decoder_architecture,
    no_sliding_window,
)
from primus_bridge.errors import ConfigError


def architecture(config: dict[str, Any]) -> Architecture:
    no_sliding_window(config)
    if config.get("attention_bias"):
        raise ConfigError("attention_bias is not supported for qwen3; released Qwen3 models have none")
    # transformers' default when config.json is silent: 128, not hidden_size / heads
    return decoder_architecture(config, qk_layernorm=True, kv_channels=config.get("head_dim") or 128)


FAMILY = Family("Qwen3", "qwen3", EMBEDDING + ATTENTION_WEIGHTS + QK_NORM + MLP_WEIGHTS + OUTPUT, architecture)
