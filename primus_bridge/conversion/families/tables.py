"""Rows that the families' rule tables share: Megatron's names, and those of the Llama-shaped Hugging Face models.

Megatron's names are those of the Transformer Engine spec, which are the names in every Megatron checkpoint.
"""

from __future__ import annotations

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.rules import VOCAB, Copy, FusedQKV, GatedMLP, Rule

LAYER = "model.layers.{layer}."
MEGATRON_LAYER = "decoder.layers.{layer}."
ATTENTION = MEGATRON_LAYER + "self_attention."
MLP = MEGATRON_LAYER + "mlp."
INPUT_NORM = ATTENTION + "linear_qkv.layer_norm_"
"""+ weight or bias, as the other norms"""
MLP_NORM = MLP + "linear_fc1.layer_norm_"
EXPERTS_NORM = MEGATRON_LAYER + "pre_mlp_layernorm."
POST_ATTENTION_NORM = ATTENTION + "linear_proj.post_layernorm."
POST_MLP_NORM = MLP + "linear_fc2.post_layernorm."
HIDDEN = ("hidden_size",)


def dense(arch: Architecture, layer: int) -> bool:
    """The layer has an MLP, not experts."""
    return not arch.has_experts(layer)


def sparse(arch: Architecture, layer: int) -> bool:
    """The layer has experts."""
    return arch.has_experts(layer)


def norm(megatron: str, hf: str, when=lambda arch, layer: True, shape=HIDDEN) -> tuple[Rule, ...]:
    """A norm's weight; and its bias, where the architecture's norms have one. megatron, hf: names up to the last dot
    or underscore."""
    return (
        Copy(megatron + "weight", hf + "weight", shape=shape, when=when),
        Copy(
            megatron + "bias",
            hf + "bias",
            shape=shape,
            when=lambda arch, layer: arch.norm == "layer" and when(arch, layer),
        ),
    )


def embedding(hf: str) -> tuple[Rule, ...]:
    return (Copy("embedding.word_embeddings.weight", hf, shape=("vocab_size", "hidden_size"), split=VOCAB),)


def output(hf: str) -> tuple[Rule, ...]:
    return (
        Copy(
            "output_layer.weight",
            hf,
            shape=("vocab_size", "hidden_size"),
            split=VOCAB,
            when=lambda arch, layer: not arch.tied_embeddings,
        ),
    )


def linear(megatron: str, hf: str, shape: tuple, split: int, when=lambda arch, layer: True, bias=None, **options):
    """A linear's weight [out, in], and its bias where ``bias(arch)`` says so; ``split`` over its outputs (0) or
    inputs (1). megatron, hf: names up to the last dot."""
    rules: tuple[Rule, ...] = (
        Copy(megatron + "weight", hf + "weight", shape=shape, split=split, when=when, **options),
    )
    if bias is not None:
        rules += (
            Copy(
                megatron + "bias",
                hf + "bias",
                shape=shape[:1],
                split=0 if split == 0 else None,
                when=lambda arch, layer: bias(arch) and when(arch, layer),
            ),
        )
    return rules


ATTENTION_OUT = linear(
    ATTENTION + "linear_proj.",
    LAYER + "self_attn.o_proj.",
    shape=("hidden_size", "attention_size"),
    split=1,
    bias=lambda arch: arch.attention_out_bias,
)
QKV = tuple(
    FusedQKV(
        ATTENTION + f"linear_qkv.{kind}",
        q=LAYER + f"self_attn.q_proj.{kind}",
        k=LAYER + f"self_attn.k_proj.{kind}",
        v=LAYER + f"self_attn.v_proj.{kind}",
        bias=kind == "bias",
        when=lambda arch, layer, kind=kind: kind == "weight" or arch.qkv_bias,  # type: ignore[misc]
    )
    for kind in ("weight", "bias")
)
QK_NORM = tuple(
    rule
    for part, size in (("q", "q_size"), ("k", "kv_size"))
    for rule in (
        Copy(
            ATTENTION + f"{part}_layernorm.weight",
            LAYER + f"self_attn.{part}_norm.weight",
            shape=("kv_channels",),
            when=lambda arch, layer: arch.qk_norm == "head",
        ),
        Copy(
            ATTENTION + f"{part}_layernorm.weight",
            LAYER + f"self_attn.{part}_norm.weight",
            shape=(size,),
            split=0,
            when=lambda arch, layer: arch.qk_norm == "all",
        ),
    )
)
MLP_OUT = linear(
    MLP + "linear_fc2.",
    LAYER + "mlp.down_proj.",
    shape=("hidden_size", "ffn_hidden_size"),
    split=1,
    when=dense,
    bias=lambda arch: arch.mlp_bias,
)
GATE_UP = tuple(
    GatedMLP(
        MLP + f"linear_fc1.{kind}",
        gate=LAYER + f"mlp.gate_proj.{kind}",
        up=LAYER + f"mlp.up_proj.{kind}",
        bias=kind == "bias",
        when=lambda arch, layer, kind=kind: dense(arch, layer) and (kind == "weight" or arch.mlp_bias),  # type: ignore[misc]
    )
    for kind in ("weight", "bias")
)
PACKED_GATE_UP = (GatedMLP(MLP + "linear_fc1.weight", packed=LAYER + "mlp.gate_up_proj.weight", when=dense),)

EMBEDDING = embedding("model.embed_tokens.weight")
OUTPUT = norm("decoder.final_layernorm.", "model.norm.") + output("lm_head.weight")
ATTENTION_BLOCK = norm(INPUT_NORM, LAYER + "input_layernorm.") + QKV + ATTENTION_OUT + QK_NORM
MLP_BLOCK = norm(MLP_NORM, LAYER + "post_attention_layernorm.", when=dense) + GATE_UP + MLP_OUT
DECODER = EMBEDDING + ATTENTION_BLOCK + MLP_BLOCK + OUTPUT
"""A Llama-shaped model: grouped queries, gated MLP, a norm before each; biases and q/k norms where it has them."""


def experts(
    router: str = "mlp.gate.",
    gate: str = "mlp.experts.{expert}.gate_proj.weight",
    up: str = "mlp.experts.{expert}.up_proj.weight",
    down: str = "mlp.experts.{expert}.down_proj.weight",
) -> tuple[Rule, ...]:
    """The layers that have experts; names are those under LAYER."""
    return (
        *norm(EXPERTS_NORM, LAYER + "post_attention_layernorm.", when=sparse),
        Copy(MLP + "router.weight", LAYER + router + "weight", shape=("moe.num_experts", "hidden_size"), when=sparse),
        Copy(
            MLP + "router.expert_bias",
            LAYER + router + "e_score_correction_bias",
            shape=("moe.num_experts",),
            keep_fp32=True,
            when=lambda arch, layer: sparse(arch, layer) and arch.moe is not None and arch.moe.selection_bias,
        ),
        GatedMLP(
            MLP + "experts.linear_fc1.weight{expert}",
            gate=LAYER + gate,
            up=LAYER + up,
            size="moe.ffn_hidden_size",
            when=sparse,
        ),
        Copy(
            MLP + "experts.linear_fc2.weight{expert}",
            LAYER + down,
            shape=("hidden_size", "moe.ffn_hidden_size"),
            split=1,
            when=sparse,
        ),
    )


def shared_experts(hf: str) -> tuple[Rule, ...]:
    """An MLP that every token goes through beside its experts; ``hf``: its name under LAYER."""

    def there(arch: Architecture, layer: int) -> bool:
        return sparse(arch, layer) and arch.moe is not None and arch.moe.shared_ffn_hidden_size > 0

    return (
        GatedMLP(
            MLP + "shared_experts.linear_fc1.weight",
            gate=LAYER + hf + "gate_proj.weight",
            up=LAYER + hf + "up_proj.weight",
            size="moe.shared_ffn_hidden_size",
            when=there,
        ),
        Copy(
            MLP + "shared_experts.linear_fc2.weight",
            LAYER + hf + "down_proj.weight",
            shape=("hidden_size", "moe.shared_ffn_hidden_size"),
            split=1,
            when=there,
        ),
        Copy(
            MLP + "shared_experts.gate_weight",
            LAYER + "mlp.shared_expert_gate.weight",
            shape=(1, "hidden_size"),
            when=lambda arch, layer: there(arch, layer) and arch.moe is not None and arch.moe.shared_gate,
        ),
    )
