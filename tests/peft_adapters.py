"""Adapters as people bring them: made by peft on the tiny models of every family, with weights that matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import family_models

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
NOT_ALL = r".*\.(self_attn\.(q|v)_proj|mlp\.(gate|down)_proj)"


@dataclass(frozen=True)
class Adapter:
    """model: a case of family_models; config: of peft.LoraConfig."""

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)


ADAPTERS = {
    "llama, list": Adapter("llama", dict(target_modules=["q_proj", "v_proj", "up_proj"], r=4, lora_alpha=7)),
    "llama, patterns": Adapter(
        "llama, tied, llama3 rope",
        dict(
            target_modules=NOT_ALL,
            r=4,
            lora_alpha=8,
            rank_pattern={"v_proj": 3, r"layers\.[12]\.mlp\.gate_proj": 6},
            alpha_pattern={"layers.0.self_attn.q_proj": 20, "down_proj": 5},
            use_rslora=True,
        ),
    ),
    "llama, some layers": Adapter(
        "llama, biases, linear rope",
        dict(target_modules=["q_proj", "o_proj", "gate_proj"], layers_to_transform=[3], use_dora=True, r=2),
    ),
    "llama, all but": Adapter(
        "llama, MQA, dynamic rope",
        dict(target_modules="all-linear", exclude_modules=["v_proj", "model.layers.2.mlp.up_proj"], r=4, use_dora=True),
    ),
    "qwen2, tied": Adapter("qwen2, tied", dict(target_modules="all-linear", r=8, use_rslora=True)),
    "gpt2": Adapter("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, r=4)),
    "gpt2, dora": Adapter("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, use_dora=True)),
    "gpt_neox": Adapter("gpt_neox", dict(target_modules="all-linear", r=4, use_dora=True)),
    "phi3": Adapter("phi3, longrope", dict(target_modules="all-linear", r=4, rank_pattern={"qkv_proj": 5})),
    "phi3, dora": Adapter("phi3, window, partial rotary", dict(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True)),
    "mixtral": Adapter("mixtral", dict(target_modules=ATTENTION, r=4)),
    "qwen2 moe": Adapter("qwen2 moe", dict(target_modules=ATTENTION, r=4, use_dora=True)),
    "deepseek_v3": Adapter("deepseek_v3", dict(target_modules=MLA, r=4, use_dora=True)),
    "deepseek_v2 lite": Adapter("deepseek_v2 lite", dict(target_modules=["q_proj", "kv_b_proj"], r=4)),
    "gemma2": Adapter("gemma2", dict(target_modules="all-linear", r=4)),
    "olmo2": Adapter("olmo2", dict(target_modules="all-linear", r=4)),
    "glm": Adapter("glm", dict(target_modules="all-linear", r=4, use_dora=True)),
    "falcon": Adapter("falcon, groups", dict(target_modules="all-linear", r=4, use_dora=True)),
}


def save(name: str, root: Path, dtype=None) -> tuple[str, str]:
    """(model folder, adapter folder) under ``root``."""
    model, adapter = str(root / "model"), str(root / "adapter")
    family_models.save(ADAPTERS[name].model, root / "model", **ADAPTERS[name].changes)
    add(name, model, adapter, dtype)
    return model, adapter


def add(name: str, model: str, folder: str, dtype=None) -> None:
    """Save an adapter over a model folder, its tensors random: lora_B is not zero."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name].config))
    generator = torch.Generator().manual_seed(7)
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.data.abs() * 0.2 if "magnitude" in key else 0.1
            parameter.data.add_(noise * scale) if "magnitude" in key else parameter.data.copy_(noise * scale)
            if dtype is not None:
                parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(folder)


def logits(model: str, adapter: str, ids):
    """What transformers and peft compute."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        return before, peft.PeftModel.from_pretrained(base, adapter).eval()(ids).logits
