"""LoRA adapters out to a PEFT folder: Hugging Face module names, one A and B a projection."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.export import ExportOptions, gathered
from primus_bridge.conversion.hf_folder import check_export_folder, copy_assets
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.conversion.rules import split_gate_up, split_qkv
from primus_bridge.conversion.safetensors_file import write_safetensors
from primus_bridge.files import partial_folder, replace_folder, write_json
from primus_bridge.peft.targets import PROJECTIONS
from primus_bridge.together import writing_together

# where the Llama-shaped families keep a projection: PEFT's keys start with base_model.model.
MODULES = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
PART_NAMES = {part: projection for projection, (_, part) in PROJECTIONS.items()}


def _split_fused(linear: str, shards: list[torch.Tensor], arch: Architecture) -> dict[str, torch.Tensor]:
    """B of a fused linear, from its shards -> B of each projection."""
    if linear == "linear_qkv":
        return dict(zip("qkv", split_qkv(shards, arch), strict=True))
    return dict(zip(("gate", "up"), split_gate_up(shards), strict=True))


def adapter_tensors(chunks: list, arch: Architecture, parallel) -> Iterator[tuple[str, torch.Tensor]]:
    """This stage's PEFT tensors by key (collective over its tensor-parallel ranks); nothing on ranks other than 0."""
    from primus_bridge.peft.lora import LoRALinear

    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for owner in (layer.self_attention, layer.mlp):
                for module in owner.children():
                    if not isinstance(module, LoRALinear):
                        continue
                    for part, adapter in module.adapters().items():
                        a = gathered(adapter.linear_in.weight, parallel)
                        b = gathered(adapter.linear_out.weight, parallel)
                        if not a:
                            continue
                        whole_a = torch.cat(a, dim=1) if adapter.row_parallel else a[0]
                        if part == "fused":
                            outs = _split_fused(module.name, b, arch)
                        else:
                            outs = {part: b[0] if adapter.row_parallel else torch.cat(b)}
                        for name, whole_b in outs.items():
                            projection = PART_NAMES[name]
                            key = (
                                f"base_model.model.model.layers.{layer.layer_number - 1}."
                                f"{MODULES[projection]}.{projection}"
                            )
                            yield f"{key}.lora_A.weight", whole_a.cpu().contiguous()
                            yield f"{key}.lora_B.weight", whole_b.cpu().contiguous()


def adapter_config(lora, projections: list[str], base: str | None) -> dict[str, Any]:
    """adapter_config.json, with the fields that PEFT and vLLM read. lora: PeftArguments."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.dim,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": projections,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def export_adapter(
    chunks: list, lora, model: HFModel, parallel, folder: Path, options: ExportOptions, *, base: str | None
) -> None:
    """Write adapter_model.safetensors, adapter_config.json and the tokenizer to ``folder``. Collective.

    lora: PeftArguments. The folder appears when it is complete. Raises ConfigError when the disk is full.
    """
    mine = dict(adapter_tensors(chunks, model.architecture, parallel)) if parallel.dp_rank == 0 else {}
    parts: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(parts, mine)
    prepared = partial_folder(folder)
    with writing_together("the adapter export", folder, remove=prepared):
        if parallel.rank == 0:
            tensors = {name: tensor.to(options.dtype) for part in parts for name, tensor in part.items()}
            projections = sorted({name.split(".")[-3] for name in tensors}, key=list(PROJECTIONS).index)
            check_export_folder(folder)
            shutil.rmtree(prepared, ignore_errors=True)
            prepared.mkdir(parents=True)
            copy_assets(options.assets, prepared)
            write_json(prepared / "adapter_config.json", adapter_config(lora, projections, base))
            entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            write_safetensors(prepared / "adapter_model.safetensors", entries, tensors.items())
            replace_folder(prepared, folder)
