"""What the Llama-shaped families share: the reading of config.json fields and the rule table's usual rows."""

from __future__ import annotations

import math
from typing import Any

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.rules import VOCAB, Copy, FusedQKV, GatedMLP
from primus_bridge.errors import ConfigError

LAYER = "model.layers.{layer}."
MEGATRON_LAYER = "decoder.layers.{layer}."
ATTENTION = MEGATRON_LAYER + "self_attention."
MLP = MEGATRON_LAYER + "mlp."

# names are those of the Transformer Engine spec, which are the names in every Megatron checkpoint
EMBEDDING = (
    Copy(
        "embedding.word_embeddings.weight",
        "model.embed_tokens.weight",
        shape=("vocab_size", "hidden_size"),
        split=VOCAB,
    ),
)
ATTENTION_WEIGHTS = (
    Copy(ATTENTION + "linear_qkv.layer_norm_weight", LAYER + "input_layernorm.weight", shape=("hidden_size",)),
    FusedQKV(
        ATTENTION + "linear_qkv.weight",
        q=LAYER + "self_attn.q_proj.weight",
        k=LAYER + "self_attn.k_proj.weight",
        v=LAYER + "self_attn.v_proj.weight",
    ),
    Copy(ATTENTION + "linear_proj.weight", LAYER + "self_attn.o_proj.weight", shape=("hidden_size", "q_size"), split=1),
)
QKV_BIAS = (
    FusedQKV(
        ATTENTION + "linear_qkv.bias",
        q=LAYER + "self_attn.q_proj.bias",
        k=LAYER + "self_attn.k_proj.bias",
        v=LAYER + "self_attn.v_proj.bias",
        bias=True,
        when=lambda arch: arch.add_qkv_bias,
    ),
)
QK_NORM = (
    Copy(ATTENTION + "q_layernorm.weight", LAYER + "self_attn.q_norm.weight", shape=("kv_channels",)),
    Copy(ATTENTION + "k_layernorm.weight", LAYER + "self_attn.k_norm.weight", shape=("kv_channels",)),
)
MLP_WEIGHTS = (
    Copy(MLP + "linear_fc1.layer_norm_weight", LAYER + "post_attention_layernorm.weight", shape=("hidden_size",)),
    GatedMLP(MLP + "linear_fc1.weight", gate=LAYER + "mlp.gate_proj.weight", up=LAYER + "mlp.up_proj.weight"),
    Copy(
        MLP + "linear_fc2.weight",
        LAYER + "mlp.down_proj.weight",
        shape=("hidden_size", "ffn_hidden_size"),
        split=1,
    ),
)
OUTPUT = (
    Copy("decoder.final_layernorm.weight", "model.norm.weight", shape=("hidden_size",)),
    Copy(
        "output_layer.weight",
        "lm_head.weight",
        shape=("vocab_size", "hidden_size"),
        split=VOCAB,
        when=lambda arch: not arch.tied_embeddings,
    ),
)


# kind -> what it needs
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def number(config: dict[str, Any], name: str, default: Any = None, whole: bool = False) -> Any:
    """A positive number of config.json, or ``default`` where it is absent or null.

    Raises ConfigError for anything else, and for an absent one without a default.
    """
    value = config.get(name)
    if value is None:
        value = default
    kinds = (int,) if whole else (int, float)
    if value is None:
        raise ConfigError(f"config.json lacks {name}")
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value!r}; expected a positive {'whole ' if whole else ''}number")
    return value


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {value!r}; expected an object")
    return dict(value)


def rope_of(config: dict[str, Any]) -> tuple[float, dict | None]:
    """(base, scaling) from either spelling: transformers 4's rope_theta + rope_scaling, or 5's rope_parameters.

    Raises ConfigError for a kind that is not in ROPE_KINDS or lacks a parameter.
    """
    scaling = _section(config, "rope_parameters") or _section(config, "rope_scaling")
    base = number({"rope_theta": scaling.pop("rope_theta", config.get("rope_theta"))}, "rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope scaling '{kind}' is not supported; supported: {', '.join(ROPE_KINDS)}")
    missing = [name for name in ROPE_KINDS[kind] if not isinstance(scaling.get(name), (int, float))]
    if missing:
        raise ConfigError(f"rope scaling '{kind}' lacks {', '.join(missing)}")
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return float(base), scaling if kind != "default" else None


def decoder_architecture(config: dict[str, Any], **different: Any) -> Architecture:
    """The Llama-shaped fields of config.json; ``different``: what a family reads in its own way.

    Raises ConfigError for a missing field or an option that no rule covers.
    """
    if config.get("quantization_config"):
        raise ConfigError("the checkpoint is quantised (quantization_config); give the unquantised model")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {config['hidden_act']!r} is not supported for {config['model_type']}; only silu")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    hidden, heads = (number(config, name, whole=True) for name in ("hidden_size", "num_attention_heads"))
    tied = config.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise ConfigError(f"tie_word_embeddings is {tied!r}; expected true or false")
    base, scaling = rope_of(config)
    fields: dict[str, Any] = dict(
        model_type=config["model_type"],
        num_layers=number(config, "num_hidden_layers", whole=True),
        hidden_size=hidden,
        ffn_hidden_size=number(config, "intermediate_size", whole=True),
        num_attention_heads=heads,
        num_query_groups=number(config, "num_key_value_heads", heads, whole=True),
        kv_channels=number(config, "head_dim", hidden // heads, whole=True),
        vocab_size=number(config, "vocab_size", whole=True),
        layernorm_epsilon=number(config, "rms_norm_eps", 1e-6),
        rotary_base=base,
        rope_scaling=scaling,
        max_position_embeddings=number(config, "max_position_embeddings", 2048, whole=True),
        tied_embeddings=tied,
        init_std=number(config, "initializer_range", 0.02),
        hf_config=config,
    )
    return Architecture(**(fields | different))


def no_sliding_window(config: dict[str, Any]) -> None:
    """Raises ConfigError when config.json turns a sliding window on."""
    layers = config.get("layer_types") or []
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in layers):
        raise ConfigError("sliding-window attention (use_sliding_window, layer_types) is not supported yet")
