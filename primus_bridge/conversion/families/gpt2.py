"""GPT-2: learned positions, LayerNorm, biases everywhere, and linears stored as [in, out] (Conv1D)."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.config_json import activation, flag, number
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
from primus_bridge.conversion.rules import Copy, FusedQKV
from primus_bridge.errors import ConfigError


def architecture(config: dict[str, Any]) -> Architecture:
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("scale_attn_weights") is False:
        raise ConfigError("scale_attn_by_inverse_layer_idx and unscaled attention are not supported for gpt2")
    hidden, heads = number(config, "n_embd", 768, whole=True), number(config, "n_head", 12, whole=True)
    return Architecture(
        model_type="gpt2",
        num_layers=number(config, "n_layer", 12, whole=True),
        hidden_size=hidden,
        ffn_hidden_size=number(config, "n_inner", 4 * hidden, whole=True),
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        vocab_size=number(config, "vocab_size", 50257, whole=True),
        layernorm_epsilon=number(config, "layer_norm_epsilon", 1e-5),
        max_position_embeddings=number(config, "n_positions", 1024, whole=True),
        tied_embeddings=flag(config, "tie_word_embeddings", True),
        norm="layer",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        activation=activation(config, "activation_function", default="gelu_new"),
        init_std=number(config, "initializer_range", 0.02),
        hf_config=config,
    )


H = "transformer.h.{layer}."


def _always(arch: Architecture) -> bool:
    return True


RULES = (
    *embedding("transformer.wte.weight"),
    Copy(
        "embedding.position_embeddings.weight",
        "transformer.wpe.weight",
        shape=("max_position_embeddings", "hidden_size"),
    ),
    *norm(INPUT_NORM, H + "ln_1."),
    FusedQKV(ATTENTION + "linear_qkv.weight", packed=H + "attn.c_attn.weight", transposed=True),
    FusedQKV(ATTENTION + "linear_qkv.bias", packed=H + "attn.c_attn.bias", bias=True),
    *linear(
        ATTENTION + "linear_proj.", H + "attn.c_proj.", ("hidden_size", "q_size"), 1, bias=_always, transposed=True
    ),
    *norm(MLP_NORM, H + "ln_2."),
    *linear(MLP + "linear_fc1.", H + "mlp.c_fc.", ("ffn_hidden_size", "hidden_size"), 0, bias=_always, transposed=True),
    *linear(
        MLP + "linear_fc2.", H + "mlp.c_proj.", ("hidden_size", "ffn_hidden_size"), 1, bias=_always, transposed=True
    ),
    *norm("decoder.final_layernorm.", "transformer.ln_f."),
    *output("lm_head.weight"),
)
FAMILIES = (Family("GPT-2", "gpt2", RULES, architecture, optional_prefix="transformer."),)
