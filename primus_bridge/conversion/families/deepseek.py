"""DeepSeek-V2 and V3: latent attention, many small experts beside shared ones, groups of experts."""

from __future__ import annotations

from typing import Any

from primus_bridge.conversion.architecture import Architecture, LatentAttention, MixtureOfExperts, Rope, yarn_mscale
from primus_bridge.conversion.config_json import (
    count,
    decoder_architecture,
    flag,
    number,
    one_of,
    optional_number,
    rope_of,
)
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import (
    ATTENTION,
    ATTENTION_OUT,
    EMBEDDING,
    LAYER,
    MEGATRON_LAYER,
    MLP_BLOCK,
    OUTPUT,
    experts,
    linear,
    norm,
    shared_experts,
)
from primus_bridge.conversion.rules import Copy
from primus_bridge.errors import ConfigError


def _common(config: dict[str, Any], moe: dict[str, Any]) -> Architecture:
    if config.get("attention_bias"):
        raise ConfigError("attention_bias is not supported with latent attention; released models have none")
    layers = number(config, "num_hidden_layers", whole=True)
    mla = LatentAttention(
        q_lora_rank=optional_number(config, "q_lora_rank", 1536, whole=True),
        kv_lora_rank=number(config, "kv_lora_rank", 512, whole=True),
        qk_nope_head_dim=number(config, "qk_nope_head_dim", 128, whole=True),
        qk_rope_head_dim=number(config, "qk_rope_head_dim", 64, whole=True),
        v_head_dim=number(config, "v_head_dim", 128, whole=True),
    )
    rope = rope_of(config, mla.qk_rope_head_dim, interleaved=flag(config, "rope_interleave", True))
    first = count(config, "first_k_dense_replace")
    every = number(config, "moe_layer_freq", 1, whole=True)
    width = number(config, "moe_intermediate_size", whole=True)
    head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    return decoder_architecture(
        config,
        num_query_groups=number(config, "num_attention_heads", whole=True),
        kv_channels=head_dim,
        mla=mla,
        rope=rope,
        softmax_scale=head_dim**-0.5 * _yarn_temperature(rope),
        moe=MixtureOfExperts(
            layers=tuple(layer >= first and layer % every == 0 for layer in range(layers)),
            num_experts=number(config, "n_routed_experts", whole=True),
            top_k=number(config, "num_experts_per_tok", 8, whole=True),
            ffn_hidden_size=width,
            shared_ffn_hidden_size=width * count(config, "n_shared_experts"),
            **moe,
        ),
    )


def _yarn_temperature(rope: Rope) -> float:
    """What YaRN multiplies the scores by, beside its scaling of cos and sin. Source: DeepSeek-V2's own model code."""
    if rope.scaling is None or not rope.scaling.get("mscale_all_dim"):
        return 1.0
    return yarn_mscale(rope.scaling["factor"], rope.scaling["mscale_all_dim"]) ** 2


def deepseek_v2(config: dict[str, Any]) -> Architecture:
    one_of(config, "scoring_func", ("softmax",), "softmax")
    if config.get("norm_topk_prob"):
        raise ConfigError("norm_topk_prob: released DeepSeek-V2 models have it off, and transformers ignores it")
    moe: dict[str, Any] = dict(normalise=False, scaling=number(config, "routed_scaling_factor", 1.0))
    if one_of(config, "topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy":
        moe |= dict(groups=number(config, "n_group", whole=True), top_groups=number(config, "topk_group", whole=True))
    return _common(config, moe)


def deepseek_v3(config: dict[str, Any]) -> Architecture:
    one_of(config, "scoring_func", ("sigmoid",), "sigmoid")
    one_of(config, "topk_method", ("noaux_tc",), "noaux_tc")
    moe: dict[str, Any] = dict(
        score="sigmoid",
        selection_bias=True,
        normalise=flag(config, "norm_topk_prob", True),
        scaling=number(config, "routed_scaling_factor", 2.5),
        groups=number(config, "n_group", 8, whole=True),
        top_groups=number(config, "topk_group", 4, whole=True),
        group_scores=2,
    )
    return _common(config, moe)


def _next_token_layers(name: str, arch: Architecture) -> bool:
    """V3's multi-token-prediction layers, after the decoder's own; transformers leaves them out as well."""
    extra = count(arch.hf_config, "num_nextn_predict_layers")
    return any(name.startswith(f"model.layers.{arch.num_layers + index}.") for index in range(extra))


def _small_queries(arch: Architecture, layer: int) -> bool:
    return arch.mla is not None and arch.mla.q_lora_rank is not None


ATTENTION_BLOCK = (
    *norm(MEGATRON_LAYER + "input_layernorm.", LAYER + "input_layernorm."),
    *linear(
        ATTENTION + "linear_q_proj.",
        LAYER + "self_attn.q_proj.",
        ("q_size", "hidden_size"),
        0,
        when=lambda arch, layer: not _small_queries(arch, layer),
    ),
    Copy(
        ATTENTION + "linear_q_down_proj.weight",
        LAYER + "self_attn.q_a_proj.weight",
        shape=("mla.q_lora_rank", "hidden_size"),
        when=_small_queries,
    ),
    Copy(
        ATTENTION + "linear_q_up_proj.layer_norm_weight",
        LAYER + "self_attn.q_a_layernorm.weight",
        shape=("mla.q_lora_rank",),
        when=_small_queries,
    ),
    Copy(
        ATTENTION + "linear_q_up_proj.weight",
        LAYER + "self_attn.q_b_proj.weight",
        shape=("q_size", "mla.q_lora_rank"),
        split=0,
        when=_small_queries,
    ),
    Copy(
        ATTENTION + "linear_kv_down_proj.weight",
        LAYER + "self_attn.kv_a_proj_with_mqa.weight",
        shape=("kv_down_size", "hidden_size"),
    ),
    Copy(
        ATTENTION + "linear_kv_up_proj.layer_norm_weight",
        LAYER + "self_attn.kv_a_layernorm.weight",
        shape=("mla.kv_lora_rank",),
    ),
    Copy(
        ATTENTION + "linear_kv_up_proj.weight",
        LAYER + "self_attn.kv_b_proj.weight",
        shape=("kv_up_size", "mla.kv_lora_rank"),
        split=0,
    ),
    *ATTENTION_OUT,
)
RULES = EMBEDDING + ATTENTION_BLOCK + MLP_BLOCK + experts() + shared_experts("mlp.shared_experts.") + OUTPUT
FAMILIES = (
    Family("DeepSeek-V2, V2-Lite", "deepseek_v2", RULES, deepseek_v2),
    Family("DeepSeek-V3, R1", "deepseek_v3", RULES, deepseek_v3, ignored=_next_token_layers),
)
