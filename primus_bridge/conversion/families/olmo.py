"""OLMo 2 and OLMoE: RMSNorm over all heads of q and k together; OLMo 2 has its norms after attention and MLP."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture, MixtureOfExperts
from primus_bridge.conversion.config_json import decoder_architecture, flag, number, optional_number
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import (
    ATTENTION_BLOCK,
    ATTENTION_OUT,
    EMBEDDING,
    GATE_UP,
    LAYER,
    MLP_OUT,
    OUTPUT,
    POST_ATTENTION_NORM,
    POST_MLP_NORM,
    QK_NORM,
    QKV,
    experts,
    norm,
)


def olmo2(config: dict[str, Any]) -> Architecture:
    return decoder_architecture(
        config, layernorm_epsilon=number(config, "rms_norm_eps", 1e-5), residual="post", qk_norm="all"
    )


def olmoe(config: dict[str, Any]) -> Architecture:
    return decoder_architecture(
        config,
        layernorm_epsilon=number(config, "rms_norm_eps", 1e-5),
        qk_norm="all",
        clip_qkv=optional_number(config, "clip_qkv"),
        moe=MixtureOfExperts(
            layers=(True,) * number(config, "num_hidden_layers", whole=True),
            num_experts=number(config, "num_experts", 64, whole=True),
            top_k=number(config, "num_experts_per_tok", 8, whole=True),
            ffn_hidden_size=number(config, "intermediate_size", whole=True),
            normalise=flag(config, "norm_topk_prob", False),
        ),
    )


OLMO2 = (
    *EMBEDDING,
    *QKV,
    *ATTENTION_OUT,
    *QK_NORM,
    *norm(POST_ATTENTION_NORM, LAYER + "post_attention_layernorm."),
    *GATE_UP,
    *MLP_OUT,
    *norm(POST_MLP_NORM, LAYER + "post_feedforward_layernorm."),
    *OUTPUT,
)
FAMILIES = (
    Family("OLMo 2", "olmo2", OLMO2, olmo2),
    Family("OLMoE", "olmoe", EMBEDDING + ATTENTION_BLOCK + experts() + OUTPUT, olmoe),
)
