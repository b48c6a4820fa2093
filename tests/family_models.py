"""A tiny random model of every family and of every detail that families differ in, made by transformers itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMON = dict(
    vocab_size=203,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR_ROPE = dict(rope_type="linear", factor=4.0)
DYNAMIC_ROPE = dict(rope_type="dynamic", factor=4.0)
YARN_ROPE = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LONG_ROPE = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.5, 2.0, 3.0, 4.0],
    original_max_position_embeddings=32,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    num_key_value_heads=8,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
)
SLIDING = dict(use_sliding_window=True, sliding_window=7)


@dataclass(frozen=True)
class Case:
    """prefix: of transformers' classes; changes: of COMMON; rope: in the spelling of the transformers installed."""

    prefix: str
    changes: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] | None = None


CASES: dict[str, Case] = {
    "llama": Case("Llama", dict(rms_norm_eps=1e-5)),
    "llama, tied, llama3 rope": Case("Llama", dict(tie_word_embeddings=True), LLAMA3_ROPE),
    "llama, biases, linear rope": Case("Llama", dict(attention_bias=True, mlp_bias=True), LINEAR_ROPE),
    "llama, MHA, yarn rope": Case("Llama", dict(num_key_value_heads=8), YARN_ROPE),
    "llama, MQA": Case("Llama", dict(num_key_value_heads=1)),
    "llama, dynamic rope": Case("Llama", dict(max_position_embeddings=48), DYNAMIC_ROPE),
    "mistral, window": Case("Mistral", dict(sliding_window=7, head_dim=16)),
    "mixtral": Case("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9)),
    "gemma": Case("Gemma", dict(head_dim=16)),
    "gemma2": Case(
        "Gemma2",
        dict(
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=7,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
        ),
    ),
    "gemma3 text": Case(
        "Gemma3Text",
        dict(
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
    "qwen2, tied": Case("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2, window": Case("Qwen2", dict(max_window_layers=2, num_key_value_heads=2, **SLIDING)),
    "qwen2 moe": Case(
        "Qwen2Moe",
        dict(decoder_sparse_step=1, mlp_only_layers=[1], shared_expert_intermediate_size=48, **EXPERTS),
    ),
    "qwen3": Case("Qwen3", dict(head_dim=16)),
    "qwen3 moe": Case("Qwen3Moe", dict(head_dim=16, norm_topk_prob=True, decoder_sparse_step=2, **EXPERTS)),
    "gpt2": Case("GPT2", dict(n_inner=96)),
    "gpt_neox": Case("GPTNeoX", dict(rotary_pct=0.5, num_key_value_heads=None)),
    "gpt_neox, in turn": Case(
        "GPTNeoX", dict(use_parallel_residual=False, attention_bias=False, num_key_value_heads=None)
    ),
    "phi3, longrope": Case("Phi3", dict(original_max_position_embeddings=32), LONG_ROPE),
    "phi3, window, partial rotary": Case("Phi3", dict(sliding_window=7, partial_rotary_factor=0.5)),
    "olmo2": Case("Olmo2"),
    "olmoe": Case("Olmoe", dict(num_experts=4, num_experts_per_tok=2, clip_qkv=0.5)),
    "deepseek_v2": Case(
        "DeepseekV2",
        dict(LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2),
        dict(YARN_ROPE, mscale=0.7, mscale_all_dim=0.8),
    ),
    "deepseek_v2 lite": Case("DeepseekV2", dict(LATENT, q_lora_rank=None, topk_method="greedy")),
    "deepseek_v3": Case("DeepseekV3", dict(LATENT, n_group=4, topk_group=2, num_experts_per_tok=4)),
    "granite": Case(
        "Granite",
        dict(
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
            attention_multiplier=0.3,
            logits_scaling=2.0,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "glm": Case("Glm", dict(head_dim=16)),
    "glm4": Case("Glm4", dict(head_dim=16, num_key_value_heads=2)),
    "falcon, one head": Case("Falcon", dict(num_key_value_heads=None)),
    "falcon, groups": Case(
        "Falcon", dict(new_decoder_architecture=True, num_kv_heads=4, bias=True, num_key_value_heads=None)
    ),
}
"""Every supported model_type is among them; "moe" and latent attention where the family has them."""

GPT2_NAMES = dict(
    hidden_size="n_embd",
    num_hidden_layers="n_layer",
    num_attention_heads="n_head",
    max_position_embeddings="n_positions",
)


def build(name: str, **changes: Any):
    """The transformers model of a case, in fp32, with weights large enough that every part matters."""
    import torch
    import transformers

    case = CASES[name]
    shape: dict[str, Any] = COMMON | case.changes | changes
    shape = {key: value for key, value in shape.items() if value is not None or key == "q_lora_rank"}
    if case.prefix == "GPT2":
        shape = {GPT2_NAMES.get(key, key): value for key, value in shape.items()}
        shape = {key: value for key, value in shape.items() if key not in ("intermediate_size", "num_key_value_heads")}
    if int(transformers.__version__.split(".")[0]) >= 5:
        shape |= {"rope_parameters": {"rope_theta": 10000.0, **case.rope}} if case.rope else {}
    else:
        shape = _spelled_as_transformers_4(shape, case.rope)
    config = getattr(transformers, case.prefix + "Config")(**shape)
    classes = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    torch.manual_seed(0)
    model = getattr(transformers, classes.get(case.prefix, case.prefix + "ForCausalLM"))(config).float().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # it would keep the gradient from token 0, which is a token as any other here
    generator = torch.Generator().manual_seed(1)
    buffers = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for _, parameter in [*model.named_parameters(), *buffers]:
        noise = torch.randn(parameter.shape, generator=generator)
        # norms around 1 (or 0), everything else with logits of order 1, biases that are not zero
        parameter.data.copy_(1 + 0.2 * noise if parameter.dim() == 1 and parameter.data.mean() > 0.5 else 0.1 * noise)
    return model


def _spelled_as_transformers_4(shape: dict[str, Any], rope: dict[str, Any] | None) -> dict[str, Any]:
    """rope_theta and rope_scaling in place of rope_parameters; and attention that knows soft caps."""
    nested = shape.pop("rope_parameters", None)
    if nested is not None:  # Gemma 3
        rope = dict(nested["full_attention"])
        shape["rope_theta"] = rope.pop("rope_theta")
        shape["rope_local_base_freq"] = nested["sliding_attention"]["rope_theta"]
    if rope is not None:
        shape["rope_scaling"] = {"type": rope["rope_type"], **rope}
        if rope["rope_type"] == "longrope":  # Phi-3 takes three fields; the original length is its own
            shape["rope_scaling"] = {key: shape["rope_scaling"][key] for key in ("type", "short_factor", "long_factor")}
    return shape | {"attn_implementation": "eager"}


def save(name: str, folder: Path, dtype=None, **changes: Any) -> str:
    """Save ``build(name)`` to folder; returns its path."""
    model = build(name, **changes)
    if dtype is not None:
        # as from_pretrained has it: what must stay in fp32 does
        kept = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
        model = model.to(dtype)
        for n, value in kept.items():
            owner, _, leaf = n.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = value
    model.save_pretrained(folder)
    return str(folder)
