"""Tiny random models in Hugging Face format, made by transformers itself."""

from __future__ import annotations

from pathlib import Path

SHAPE = dict(
    vocab_size=203,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=256,
)


def build(kind: str, **changes):
    """A transformers model of ``kind`` (llama, qwen2, qwen3) with weights large enough that every part matters."""
    import torch
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    shape = SHAPE | ({"head_dim": 16} if kind == "qwen3" else {}) | changes
    rope = shape.pop("rope", None)
    if rope is not None:
        # transformers 4 reads rope_scaling + rope_theta, 5 reads rope_parameters
        if int(transformers.__version__.split(".")[0]) >= 5:
            shape["rope_parameters"] = {"rope_theta": 10000.0, **rope}
        else:
            shape["rope_scaling"] = rope
    config = getattr(transformers, name + "Config")(**shape)
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # norms around 1, everything else with logits of order 1, biases that are not zero
        parameter.data.copy_(1 + 0.2 * noise if parameter.dim() == 1 and parameter.data.mean() > 0.5 else 0.1 * noise)
    return model


def save(kind: str, folder: Path, dtype=None, **changes) -> str:
    """Save ``build(kind, ...)`` to folder; returns its path."""
    model = build(kind, **changes)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    return str(folder)
