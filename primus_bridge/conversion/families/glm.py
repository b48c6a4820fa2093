"""GLM-4: half of each head is rotated, in neighbouring pairs; biases on q, k, v; GLM-4-0414 has norms on both sides."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.config_json import decoder_architecture, flag, number, rope_of
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import (
    ATTENTION_BLOCK,
    EMBEDDING,
    LAYER,
    MLP_NORM,
    MLP_OUT,
    OUTPUT,
    PACKED_GATE_UP,
    POST_ATTENTION_NORM,
    POST_MLP_NORM,
    norm,
)


def glm(config: dict[str, Any], **different: Any) -> Architecture:
    head_dim = number(config, "head_dim", 128, whole=True)
    return decoder_architecture(
        config,
        kv_channels=head_dim,
        layernorm_epsilon=number(config, "rms_norm_eps", 1.5625e-07),
        rope=rope_of(config, head_dim, partial=0.5, interleaved=True),
        qkv_bias=flag(config, "attention_bias", True),
        attention_out_bias=False,
        **different,
    )


def glm4(config: dict[str, Any]) -> Architecture:
    return glm(config, residual="sandwich")


MLP_BLOCK = norm(MLP_NORM, LAYER + "post_attention_layernorm.") + PACKED_GATE_UP + MLP_OUT
POST_NORMS = norm(POST_ATTENTION_NORM, LAYER + "post_self_attn_layernorm.") + norm(
    POST_MLP_NORM, LAYER + "post_mlp_layernorm."
)
FAMILIES = (
    Family("GLM-4", "glm", EMBEDDING + ATTENTION_BLOCK + MLP_BLOCK + OUTPUT, glm),
    Family("GLM-4-0414", "glm4", EMBEDDING + ATTENTION_BLOCK + MLP_BLOCK + POST_NORMS + OUTPUT, glm4),
)
