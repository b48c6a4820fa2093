"""Gemma 1, 2 and 3 (text): norms stored less 1, scaled embeddings, tanh gelu; soft caps (2), two ropes (3)."""

from __future__ import annotations

import math
from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.config_json import (
    activation,
    decoder_architecture,
    flag,
    layer_windows,
    number,
    optional_number,
    rope_of,
    section,
)
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import (
    ATTENTION_BLOCK,
    DECODER,
    EMBEDDING,
    GATE_UP,
    LAYER,
    MLP_NORM,
    MLP_OUT,
    OUTPUT,
    POST_ATTENTION_NORM,
    POST_MLP_NORM,
    norm,
)
from primus_bridge.errors import ConfigError


def gemma(config: dict[str, Any], **different: Any) -> Architecture:
    gelu = activation(config, "hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    fields: dict[str, Any] = dict(
        # the first releases say gelu and mean the tanh one, as transformers 5 reads them
        activation="gelu_tanh" if gelu == "gelu" else gelu,
        # transformers' default when config.json is silent
        kv_channels=number(config, "head_dim", 256, whole=True),
        zero_centered_norm=True,
        embedding_multiplier=math.sqrt(number(config, "hidden_size", whole=True)),
        tied_embeddings=flag(config, "tie_word_embeddings", True),
    )
    return decoder_architecture(config, **(fields | different))


def gemma2(config: dict[str, Any], **different: Any) -> Architecture:
    if config.get("use_bidirectional_attention"):
        raise ConfigError("use_bidirectional_attention: an encoder, not a decoder; it is not supported")
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 2
    fields: dict[str, Any] = dict(
        residual="sandwich",
        softmax_scale=number(config, "query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=optional_number(config, "attn_logit_softcapping", 50.0),
        logit_softcap=optional_number(config, "final_logit_softcapping", 30.0),
        windows=layer_windows(
            config,
            number(config, "num_hidden_layers", whole=True),
            number(config, "sliding_window", 4096, whole=True),
            lambda layer: (layer + 1) % every != 0,
        ),
    )
    return gemma(config, **(fields | different))


def gemma3(config: dict[str, Any]) -> Architecture:
    head_dim = number(config, "head_dim", 256, whole=True)
    nested = section(config, "rope_parameters")
    if "full_attention" in nested:
        whole, local = section(nested, "full_attention"), section(nested, "sliding_attention")
    else:
        whole = {"rope_theta": config.get("rope_theta") or 1e6, **(section(config, "rope_scaling") or nested)}
        local = {"rope_theta": config.get("rope_local_base_freq") or 1e4}
    return gemma2(
        config if config.get("sliding_window_pattern") else {"_sliding_window_pattern": 6, **config},
        hf_config=config,
        qk_norm="head",
        attention_softcap=optional_number(config, "attn_logit_softcapping"),
        logit_softcap=optional_number(config, "final_logit_softcapping"),
        rope=rope_of(config, head_dim, base=1e6, parameters=whole),
        local_rope=rope_of(config, head_dim, base=1e4, parameters=local),
    )


SANDWICH = (
    EMBEDDING
    + ATTENTION_BLOCK
    + norm(POST_ATTENTION_NORM, LAYER + "post_attention_layernorm.")
    + norm(MLP_NORM, LAYER + "pre_feedforward_layernorm.")
    + GATE_UP
    + MLP_OUT
    + norm(POST_MLP_NORM, LAYER + "post_feedforward_layernorm.")
    + OUTPUT
)
FAMILIES = (
    Family("Gemma 1", "gemma", DECODER, gemma),
    Family("Gemma 2", "gemma2", SANDWICH, gemma2),
    Family("Gemma 3 (text)", "gemma3_text", SANDWICH, gemma3),
)
