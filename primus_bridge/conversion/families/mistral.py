"""Mistral and Mixtral: a window over all layers; Mixtral has experts in every layer, two of them a token."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture, MixtureOfExperts
from primus_bridge.conversion.config_json import decoder_architecture, head_size, number, optional_number, rope_of
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import ATTENTION_BLOCK, DECODER, EMBEDDING, OUTPUT, experts


def mistral(config: dict[str, Any]) -> Architecture:
    # transformers' default when config.json is silent
    window = optional_number(config, "sliding_window", 4096, whole=True)
    return decoder_architecture(config, windows=(window,) * number(config, "num_hidden_layers", whole=True))


def mixtral(config: dict[str, Any]) -> Architecture:
    layers = number(config, "num_hidden_layers", whole=True)
    return decoder_architecture(
        config,
        # transformers' defaults when config.json is silent
        layernorm_epsilon=number(config, "rms_norm_eps", 1e-5),
        rope=rope_of(config, head_size(config), base=1e6),
        windows=(optional_number(config, "sliding_window", whole=True),) * layers,
        moe=MixtureOfExperts(
            layers=(True,) * layers,
            num_experts=number(config, "num_local_experts", 8, whole=True),
            top_k=number(config, "num_experts_per_tok", 2, whole=True),
            ffn_hidden_size=number(config, "intermediate_size", whole=True),
        ),
    )


MIXTRAL_EXPERTS = experts(
    router="block_sparse_moe.gate.",
    gate="block_sparse_moe.experts.{expert}.w1.weight",
    up="block_sparse_moe.experts.{expert}.w3.weight",
    down="block_sparse_moe.experts.{expert}.w2.weight",
)
FAMILIES = (
    Family("Mistral", "mistral", DECODER, mistral),
    Family("Mixtral", "mixtral", EMBEDDING + ATTENTION_BLOCK + MIXTRAL_EXPERTS + OUTPUT, mixtral),
)
