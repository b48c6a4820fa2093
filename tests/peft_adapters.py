"""Adapters as people bring them: made by peft on the tiny models of every family, with weights that matter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import family_models

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
NOT_ALL = r".*\.(self_attn\.(q|v)_proj|mlp\.(gate|down)_proj)"


@dataclass(frozen=True)
class Adapter:
    """model: a case of family_models; config: of peft.LoraConfig.

    by_hand: linears that peft 0.21 takes for the routed experts', which transformers 5 has no modules for.
    """

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    by_hand: bool = False


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
        "llama, MQA",
        dict(target_modules="all-linear", exclude_modules=["v_proj", "model.layers.2.mlp.up_proj"], r=4, use_dora=True),
    ),
    "qwen2, tied": Adapter("qwen2, tied", dict(target_modules="all-linear", r=8, use_rslora=True)),
    "gpt2": Adapter("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, r=4)),
    "gpt2, dora": Adapter("gpt2", dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, use_dora=True)),
    "gpt_neox": Adapter("gpt_neox", dict(target_modules="all-linear", r=4, use_dora=True)),
    "phi3": Adapter("phi3, longrope", dict(target_modules="all-linear", r=4, rank_pattern={"qkv_proj": 5})),
    "phi3, dora": Adapter(
        "phi3, window, partial rotary", dict(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True)
    ),
    "mixtral": Adapter("mixtral", dict(target_modules=ATTENTION, r=4)),
    "qwen2 moe": Adapter("qwen2 moe", dict(target_modules=ATTENTION, r=4, use_dora=True)),
    "qwen2 moe, shared": Adapter(
        "qwen2 moe",
        dict(target_modules=["v_proj", "shared_expert.gate_proj", "shared_expert.down_proj", "mlp.up_proj"]),
        by_hand=True,
    ),
    "deepseek_v3, shared": Adapter(
        "deepseek_v3",
        dict(target_modules=["kv_b_proj", "shared_experts.up_proj", "shared_experts.down_proj", "mlp.gate_proj"]),
        by_hand=True,
    ),
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
    if ADAPTERS[name].by_hand:
        return _add_by_hand(ADAPTERS[name].config["target_modules"], base, model, Path(folder))
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


RANK = 4


def _add_by_hand(targets: list[str], base, model: str, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for module, layer in base.named_modules():
        if any(module.endswith("." + target) for target in targets):
            rows, columns = layer.weight.shape
            for kind, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                tensors[f"base_model.model.{module}.{kind}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=RANK, lora_alpha=6, target_modules=targets, base_model_name_or_path=model)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _merge_by_hand(base, folder: str) -> None:
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    for key, a in tensors.items():
        if ".lora_A." in key:
            module = base.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight.data += 6 / RANK * tensors[key.replace("lora_A", "lora_B")] @ a


def logits(model: str, adapter: str, ids):
    """What transformers and peft compute."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        if "task_type" not in json.loads(Path(adapter, "adapter_config.json").read_text()):
            _merge_by_hand(base, adapter)
            return before, base(ids).logits
        return before, peft.PeftModel.from_pretrained(base, adapter).eval()(ids).logits
