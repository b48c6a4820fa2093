"""Llama 1, 2, 3, 3.1, 3.2, 3.3: grouped queries, rope scaling, tied or untied embeddings."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.common import (
    ATTENTION_WEIGHTS,
    EMBEDDING,
    MLP_WEIGHTS,
    OUTPUT,
    decoder_architecture,
)
from primus_bridge.errors import ConfigError


def architecture(config: dict[str, Any]) -> Architecture:
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ConfigError("attention_bias and mlp_bias are not supported for llama; released Llama models have neither")
    return decoder_architecture(config)


FAMILY = Family("Llama", "llama", EMBEDDING + ATTENTION_WEIGHTS + MLP_WEIGHTS + OUTPUT, architecture)
