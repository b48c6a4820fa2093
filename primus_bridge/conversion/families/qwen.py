"""Qwen 2, 2.5 and 3, dense and with experts: biases on q, k, v (2), RMSNorm on each head of q and k (3)."""

from __future__ import annotations

from typing import Any, Optional

from primus_bridge.conversion.architecture import Architecture, MixtureOfExperts
from primus_bridge.conversion.config_json import decoder_architecture, flag, layer_windows, number, optional_number
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.families.tables import (
    ATTENTION_BLOCK,
    DECODER,
    EMBEDDING,
    MLP_BLOCK,
    OUTPUT,
    experts,
    shared_experts,
)
from primus_bridge.errors import ConfigError


def _windows(config: dict[str, Any], slides) -> tuple[Optional[int], ...]:
    window = optional_number(config, "sliding_window", 4096, whole=True) if config.get("use_sliding_window") else None
    return layer_windows(config, number(config, "num_hidden_layers", whole=True), window, slides)


def qwen2(config: dict[str, Any]) -> Architecture:
    first = config.get("max_window_layers", 28)
    windows = _windows(config, lambda layer: layer >= first)
    return decoder_architecture(config, qkv_bias=True, attention_out_bias=False, windows=windows)


def qwen3(config: dict[str, Any]) -> Architecture:
    first = config.get("max_window_layers", 28)
    windows = _windows(config, lambda layer: layer >= first)
    # transformers' default when config.json is silent: 128, not hidden_size / heads
    return decoder_architecture(
        config, qk_norm="head", kv_channels=number(config, "head_dim", 128, whole=True), windows=windows
    )


def _experts(config: dict[str, Any], **shared: Any) -> MixtureOfExperts:
    step, dense = number(config, "decoder_sparse_step", 1, whole=True), config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"mlp_only_layers is {dense!r}; expected a list of layers")
    layers = number(config, "num_hidden_layers", whole=True)
    named = "num_experts" if "num_experts" in config else "num_local_experts"
    return MixtureOfExperts(
        layers=tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers)),
        num_experts=number(config, named, 60 if shared else 128, whole=True),
        top_k=number(config, "num_experts_per_tok", 4 if shared else 8, whole=True),
        ffn_hidden_size=number(config, "moe_intermediate_size", whole=True),
        normalise=flag(config, "norm_topk_prob", False),
        **shared,
    )


def qwen2_moe(config: dict[str, Any]) -> Architecture:
    last = config.get("max_window_layers", 28)
    shared = number(config, "shared_expert_intermediate_size", whole=True)
    return decoder_architecture(
        config,
        qkv_bias=flag(config, "qkv_bias", True),
        attention_out_bias=False,
        windows=_windows(config, lambda layer: layer % 2 == 0 and layer < last),
        moe=_experts(config, shared_ffn_hidden_size=shared, shared_gate=True),
    )


def qwen3_moe(config: dict[str, Any]) -> Architecture:
    return decoder_architecture(
        config, qk_norm="head", windows=_windows(config, lambda layer: True), moe=_experts(config)
    )


LAYERS = EMBEDDING + ATTENTION_BLOCK + MLP_BLOCK + experts()
FAMILIES = (
    Family("Qwen2, Qwen2.5", "qwen2", DECODER, qwen2),
    Family("Qwen3", "qwen3", DECODER, qwen3),
    Family("Qwen1.5-MoE, Qwen2-MoE", "qwen2_moe", LAYERS + shared_experts("mlp.shared_expert.") + OUTPUT, qwen2_moe),
    Family("Qwen3-MoE", "qwen3_moe", LAYERS + OUTPUT, qwen3_moe),
)
