"""GPT-NeoX and Pythia: qkv fused head by head, partial rotary, attention and MLP side by side."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.config_json import activation, decoder_architecture, flag, number, rope_of
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


def architecture(config: dict[str, Any]) -> Architecture:
    hidden, heads = (number(config, name, whole=True) for name in ("hidden_size", "num_attention_heads"))
    rope = rope_of(
        config,
        hidden // heads,
        base=number(config, "rotary_emb_base", 10000),
        partial=number(config, "rotary_pct", 0.25),
    )
    biases = flag(config, "attention_bias", True)
    return decoder_architecture(
        config,
        num_query_groups=heads,
        rope=rope,
        norm="layer",
        layernorm_epsilon=number(config, "layer_norm_eps", 1e-5),
        residual="parallel" if flag(config, "use_parallel_residual", True) else "pre",
        qkv_bias=biases,
        attention_out_bias=biases,
        mlp_bias=True,
        gated_mlp=False,
        activation=activation(config, "hidden_act", default="gelu"),
    )


LAYER = "gpt_neox.layers.{layer}."
QKV_SHAPE, OUT_SHAPE = ("qkv_size", "hidden_size"), ("hidden_size", "q_size")
UP_SHAPE, DOWN_SHAPE = ("ffn_hidden_size", "hidden_size"), ("hidden_size", "ffn_hidden_size")
RULES = (
    *embedding("gpt_neox.embed_in.weight"),
    *norm(INPUT_NORM, LAYER + "input_layernorm."),
    # each head's q, k, v together: Megatron's own order where every head is a group
    *linear(ATTENTION + "linear_qkv.", LAYER + "attention.query_key_value.", QKV_SHAPE, 0, bias=lambda a: a.qkv_bias),
    *linear(ATTENTION + "linear_proj.", LAYER + "attention.dense.", OUT_SHAPE, 1, bias=lambda a: a.attention_out_bias),
    *norm(MLP_NORM, LAYER + "post_attention_layernorm."),
    *linear(MLP + "linear_fc1.", LAYER + "mlp.dense_h_to_4h.", UP_SHAPE, 0, bias=lambda a: True),
    *linear(MLP + "linear_fc2.", LAYER + "mlp.dense_4h_to_h.", DOWN_SHAPE, 1, bias=lambda a: True),
    *norm("decoder.final_layernorm.", "gpt_neox.final_layer_norm."),
    *output("embed_out.weight"),
)
FAMILIES = (Family("GPT-NeoX, Pythia", "gpt_neox", RULES, architecture),)
