"""The same architecture, small: a config.json with few layers and small width, and a random model of it.

Kept: every flag and kind (layers with and without window or experts, rope kind, norms, biases, ties) and the ratios
that code depends on (query heads a KV head, head size against width, MLP against width, context against its original
length, experts against their groups). Windows, soft caps and original context lengths become so small that a short
sequence reaches them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Sequence

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.files import write_json

SEQ_LENGTH = 96
"""Tokens that reach past the windows and original context lengths of a shrunk model."""
WINDOW = 12
VOCAB_SIZE = 199  # no multiple of anything, so that its padding is exercised
QUERY_HEADS = 8  # of many, with one KV head for all
LARGEST_RATIO = 16
EXPERTS, EXPERT_GROUPS, CHOSEN_GROUPS, CHOSEN = 8, 4, 2, 3
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
ATTENTION_SOFTCAP, LOGIT_SOFTCAP, CLIP = 3.0, 2.0, 0.5
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LEFT_OUT = ("quantization_config", "compression_config", "auto_map", "_name_or_path")

# what transformers takes where config.json is silent, of sizes that would not be small
_EXPERTS = {"num_experts_per_tok": 8, "num_experts": 128}
_LATENT = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts_per_tok": 8,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 256},
    "gemma2": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6},
    "qwen2": {"max_window_layers": 28},
    "qwen2_moe": {"num_experts_per_tok": 4, "num_experts": 60, "max_window_layers": 28},
    "qwen3": {"head_dim": 128, "max_window_layers": 28},
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS | {"num_experts": 64},
    "glm": {"head_dim": 128},
    "glm4": {"head_dim": 128},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | {"n_group": 8, "topk_group": 4},
}


def shrunk_config(
    config: dict[str, Any],
    architecture: Callable[[dict[str, Any]], Architecture],
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    seq_length: int = SEQ_LENGTH,
) -> dict[str, Any]:
    """config.json of the same architecture, small enough for a laptop, in the spelling that ``config`` has.

    architecture: how its family reads it. The layout's sizes divide the result where they divide the original (layers:
    always). seq_length: tokens that reach past its windows and original context lengths.
    """
    arch = architecture(config)
    new = {**DEFAULTS.get(arch.model_type, {}), **config}
    for name in LEFT_OUT:
        new.pop(name, None)
    put = _Writer(new)
    heads, groups = _heads(arch, tensor)
    head_size = _head_size(arch, heads)
    hidden = _hidden_size(arch, heads, head_size)
    multiple = math.lcm(8, tensor, expert_tensor)

    def width(size: int) -> int:
        return max(multiple, multiple * round(size / arch.hidden_size * hidden / multiple))

    put(("hidden_size", "n_embd"), hidden)
    put(("num_attention_heads", "n_head"), heads)
    put(("num_key_value_heads", "num_kv_heads"), groups)
    put(("head_dim",), LATENT["qk_rope_head_dim"] if arch.mla else head_size)
    for name in ("intermediate_size", "n_inner", "ffn_hidden_size"):
        if new.get(name):
            new[name] = width(new[name])
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if new.get(name):
            new[name] = max(2 * multiple, width(new[name]))
    put(("vocab_size",), min(VOCAB_SIZE, arch.vocab_size))
    for name, token in SPECIAL_TOKENS.items():
        put((name,), [token] if isinstance(new.get(name), list) else token)
    for name, size in LATENT.items():
        put((name,), size)
    put(("query_pre_attn_scalar",), max(1, round(new.get("query_pre_attn_scalar", 0) * head_size / arch.kv_channels)))
    if arch.model_type == "granite":
        put(("attention_multiplier",), new.get("attention_multiplier", 1.0) * arch.kv_channels / head_size)
    put(("attn_logit_softcapping",), ATTENTION_SOFTCAP)
    put(("final_logit_softcapping",), LOGIT_SOFTCAP)
    put(("clip_qkv",), CLIP)
    put(("sliding_window",), WINDOW)
    _layers(new, put, arch, architecture, pipeline)
    _experts(new, put, arch, expert)
    _positions(new, put, arch, seq_length, head_size)
    return new


class _Writer:
    """Writes a value under each of a size's names that the config has, unless it is null there."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def __call__(self, names: Sequence[str], value: Any) -> None:
        for name in names:
            if self.config.get(name) is not None:
                self.config[name] = value


def _heads(arch: Architecture, tensor: int) -> tuple[int, int]:
    """(query heads, KV heads): two KV heads or more with as many query heads each as the original has."""
    heads, groups = arch.num_attention_heads, arch.num_query_groups
    if groups == heads:
        both = math.lcm(2, tensor) if tensor > 2 else 4
        return both, both
    if groups == 1:
        few = min(heads, QUERY_HEADS)
        return (few if few % tensor == 0 else math.lcm(few, tensor)), 1
    ratio = min(heads // groups, LARGEST_RATIO)
    if groups % tensor == 0:
        groups = max(2, tensor)
    return groups * ratio, groups


def _head_size(arch: Architecture, heads: int) -> int:
    """A head's size of which an even number, at least 4, is rotated."""
    size = 16 if heads <= QUERY_HEADS else 8
    if arch.mla is not None:
        return LATENT["qk_nope_head_dim"] + LATENT["qk_rope_head_dim"]
    share = arch.rope.dim / arch.kv_channels if arch.rope else 1.0
    while int(size * share) % 2 or int(size * share) < 4:
        size *= 2
    return size


def _hidden_size(arch: Architecture, heads: int, head_size: int) -> int:
    """heads x head_size where the original is so; else as much larger or smaller as the original."""
    if arch.mla is not None:
        return 16 * heads
    of_heads = heads * head_size
    ratio = arch.hidden_size / arch.q_size
    if ratio == 1:
        return of_heads
    multiple = math.lcm(8, heads) if arch.hidden_size % arch.num_attention_heads == 0 else 8
    rounded = max(multiple, multiple * round(ratio * of_heads / multiple))
    return rounded if rounded != of_heads else rounded + (multiple if ratio > 1 else -multiple)


def layer_kinds(arch: Architecture) -> list[tuple[bool, bool]]:
    """For each layer: whether it has a window, whether it has experts."""
    return [(arch.window(layer) is not None, arch.has_experts(layer)) for layer in range(arch.num_layers)]


def _layers(new, put: _Writer, arch: Architecture, architecture, pipeline: int) -> None:
    """Two layers of one kind, three of dense ones then experts, else four: two of each kind."""
    kinds = layer_kinds(arch)
    changes = sum(before != after for before, after in zip(kinds, kinds[1:], strict=False))
    dense_first = bool(new.get("first_k_dense_replace")) and changes == 1
    layers = 2 if not changes else 3 if dense_first else 4
    layers = -(-min(layers, arch.num_layers) // pipeline) * pipeline
    put(("num_hidden_layers", "n_layer"), layers)
    if isinstance(new.get("layer_types"), list):
        types = list(dict.fromkeys(new["layer_types"]))
        blocks = sum(a != b for a, b in zip(new["layer_types"], new["layer_types"][1:], strict=False)) == 1
        every = max(1, layers // len(types)) if blocks else 1
        new["layer_types"] = [types[layer // every % len(types)] for layer in range(layers)]
    put(("sliding_window_pattern", "_sliding_window_pattern"), 2)
    last = new.get("max_window_layers")
    if last is not None:
        new["max_window_layers"] = layers if last >= arch.num_layers else layers // 2 if last else 0
    put(
        ("decoder_sparse_step", "moe_layer_freq"),
        min(new.get("decoder_sparse_step") or new.get("moe_layer_freq") or 1, 2),
    )
    if new.get("first_k_dense_replace"):
        new["first_k_dense_replace"] = 1
    if new.get("mlp_only_layers"):
        new["mlp_only_layers"] = [layer for layer in new["mlp_only_layers"] if layer < layers - 1] or [1]


def _experts(new, put: _Writer, arch: Architecture, expert: int) -> None:
    moe = arch.moe
    if moe is None:
        return
    experts = min(moe.num_experts, EXPERTS)
    if moe.num_experts % expert == 0:
        experts = math.lcm(experts, expert)
    put(("num_experts", "num_local_experts", "n_routed_experts"), experts)
    put(("num_experts_per_tok",), min(moe.top_k, CHOSEN))
    if moe.groups > 1:
        put(("n_group",), EXPERT_GROUPS)
        put(("topk_group",), CHOSEN_GROUPS)
    put(("n_shared_experts",), min(new.get("n_shared_experts") or 0, 2))


def _positions(new, put: _Writer, arch: Architecture, seq_length: int, head_size: int) -> None:
    """Original context lengths of half the sequence, and the context as much longer as the original's."""
    original = seq_length // 2
    scaling = arch.rope.scaling if arch.rope else None
    kind = scaling["rope_type"] if scaling else "default"
    before = (scaling or {}).get("original_max_position_embeddings")
    if before:
        longest = max(1, round(original * arch.max_position_embeddings / before))
    elif kind == "dynamic":
        longest = original
    else:
        longest = max(seq_length, min(arch.max_position_embeddings, 128))
    put(("max_position_embeddings", "n_positions", "n_ctx"), longest)
    put(("original_max_position_embeddings",), original)
    rotated = (
        LATENT["qk_rope_head_dim"]
        if arch.mla
        else int(head_size * (arch.rope.dim / arch.kv_channels if arch.rope else 1))
    )
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(new.get(name), dict):
            new[name] = _rope_section(new[name], original, rotated // 2)


def _rope_section(section: dict[str, Any], original: int, pairs: int) -> dict[str, Any]:
    """rope_scaling or rope_parameters, which may hold one section a kind of layer."""
    out: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            value = _rope_section(value, original, pairs)
        elif name == "original_max_position_embeddings" and value is not None:
            value = original
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            value = [value[round(pair * (len(value) - 1) / max(pairs - 1, 1))] for pair in range(pairs)]
        out[name] = value
    return out


def save_random_model(config: dict[str, Any], folder: Path, seed: int) -> None:
    """A model folder of ``config`` whose weights are random, fp32, and of a size at which every part matters.

    config.json is written as it is given; transformers, which makes the model, would write its own spelling.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, trust_remote_code=False)
        randomise(model, seed)
    model.save_pretrained(folder)
    write_json(folder / "config.json", config)


def randomise(model, seed: int) -> None:
    """Norms around 1 (or 0, where that is stored), biases that are not zero, matrices that keep their input's size.

    transformers' own initialisation has zero biases and all norms 1: an exchanged bias or norm would not show.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, parameter in [*model.named_parameters(), *buffers]:
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            values = 1 + 0.2 * noise if parameter.data.float().mean() > 0.5 else 0.1 * noise
        elif "embed" in name or "wte" in name or "wpe" in name:
            values = 0.1 * noise
        else:
            values = noise * (0.8 / math.sqrt(parameter.shape[-1]))
        parameter.data.copy_(values)
