"""Falcon with rotary positions: one KV head (7B) or groups (40B, 180B), attention and MLP side by side."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.config_json import activation, decoder_architecture, flag, number
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import (
    ATTENTION,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    embedding,
    linear,
    norm,
    output,
)
from primus_bridge.errors import ConfigError


def architecture(config: dict[str, Any]) -> Architecture:
    if config.get("alibi"):
        raise ConfigError("alibi positions (Falcon-RW) are not supported; Megatron-Core has no attention with them")
    heads, hidden = (number(config, name, whole=True) for name in ("num_attention_heads", "hidden_size"))
    grouped = flag(config, "new_decoder_architecture", False)
    side_by_side = flag(config, "parallel_attn", True)
    if grouped and not side_by_side:
        raise ConfigError("new_decoder_architecture without parallel_attn is not supported; no Falcon was released so")
    norms = config.get("num_ln_in_parallel_attn") or (2 if grouped else 1)
    biases = flag(config, "bias", False)
    groups = number(config, "num_kv_heads", heads, whole=True) if grouped else heads
    if not grouped and flag(config, "multi_query", True):
        groups = 1
    return decoder_architecture(
        config,
        ffn_hidden_size=number(config, "ffn_hidden_size", 4 * hidden, whole=True),
        num_query_groups=groups,
        kv_channels=hidden // heads,
        norm="layer",
        layernorm_epsilon=number(config, "layer_norm_epsilon", 1e-5),
        residual=("parallel" if norms == 2 and grouped else "parallel one norm") if side_by_side else "pre",
        qkv_bias=biases,
        attention_out_bias=biases,
        mlp_bias=biases,
        gated_mlp=False,
        activation=activation(config, "activation", default="gelu"),
        tied_embeddings=flag(config, "tie_word_embeddings", True),
    )


H = "transformer.h.{layer}."


def _two_norms(arch: Architecture, layer: int) -> bool:
    return arch.residual == "parallel"


def _bias(arch: Architecture) -> bool:
    return arch.mlp_bias


RULES = (
    *embedding("transformer.word_embeddings.weight"),
    *norm(INPUT_NORM, H + "ln_attn.", when=_two_norms),
    *norm(INPUT_NORM, H + "input_layernorm.", when=lambda arch, layer: arch.residual != "parallel"),
    # the heads of a group, then its k and v: Megatron's own order
    *linear(
        ATTENTION + "linear_qkv.", H + "self_attention.query_key_value.", ("qkv_size", "hidden_size"), 0, bias=_bias
    ),
    *linear(ATTENTION + "linear_proj.", H + "self_attention.dense.", ("hidden_size", "q_size"), 1, bias=_bias),
    *norm(MLP_NORM, H + "ln_mlp.", when=_two_norms),
    *norm(MLP_NORM, H + "post_attention_layernorm.", when=lambda arch, layer: arch.residual == "pre"),
    *linear(MLP + "linear_fc1.", H + "mlp.dense_h_to_4h.", ("ffn_hidden_size", "hidden_size"), 0, bias=_bias),
    *linear(MLP + "linear_fc2.", H + "mlp.dense_4h_to_h.", ("hidden_size", "ffn_hidden_size"), 1, bias=_bias),
    *norm("decoder.final_layernorm.", "transformer.ln_f."),
    *output("lm_head.weight"),
)
FAMILIES = (Family("Falcon 7B, 40B, 180B", "falcon", RULES, architecture),)
