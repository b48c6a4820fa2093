"""Granite 3: a Llama whose embeddings, residual branches, attention scores and logits are scaled."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.config_json import decoder_architecture, number
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import DECODER


def architecture(config: dict[str, Any]) -> Architecture:
    return decoder_architecture(
        config,
        embedding_multiplier=number(config, "embedding_multiplier", 1.0),
        residual_multiplier=number(config, "residual_multiplier", 1.0),
        softmax_scale=number(config, "attention_multiplier", 1.0),
        logits_divisor=number(config, "logits_scaling", 1.0),
    )


FAMILIES = (Family("Granite 3", "granite", DECODER, architecture),)
