"""Phi-3, Phi-3.5 and Phi-4 (mini): q, k, v in one tensor and gate, up in another; longrope; a window."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.config_json import decoder_architecture, number, optional_number
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import (
    ATTENTION,
    ATTENTION_OUT,
    EMBEDDING,
    INPUT_NORM,
    LAYER,
    MLP_NORM,
    MLP_OUT,
    OUTPUT,
    PACKED_GATE_UP,
    norm,
)
from primus_bridge.conversion.rules import FusedQKV


def architecture(config: dict[str, Any]) -> Architecture:
    window = optional_number(config, "sliding_window", whole=True)
    return decoder_architecture(
        config,
        layernorm_epsilon=number(config, "rms_norm_eps", 1e-5),
        qkv_bias=False,
        attention_out_bias=False,
        windows=(window,) * number(config, "num_hidden_layers", whole=True),
    )


RULES = (
    *EMBEDDING,
    *norm(INPUT_NORM, LAYER + "input_layernorm."),
    FusedQKV(ATTENTION + "linear_qkv.weight", packed=LAYER + "self_attn.qkv_proj.weight"),
    *ATTENTION_OUT,
    *norm(MLP_NORM, LAYER + "post_attention_layernorm."),
    *PACKED_GATE_UP,
    *MLP_OUT,
    *OUTPUT,
)
FAMILIES = (Family("Phi-3, Phi-3.5, Phi-4", "phi3", RULES, architecture),)
