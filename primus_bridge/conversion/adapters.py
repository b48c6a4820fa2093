"""Adapters between the model and a PEFT folder: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Mapping, Optional

from primus_bridge.conversion.adapter_rules import adapter_family
from primus_bridge.conversion.export import ExportOptions, write_pieces
from primus_bridge.conversion.hf_folder import check_export_folder, copy_assets, is_folder
from primus_bridge.conversion.load import load_weights
from primus_bridge.conversion.rules import TensorReader, placed_rules
from primus_bridge.conversion.safetensors_file import SafetensorsFile
from primus_bridge.files import partial_folder, replace_folder, write_json
from primus_bridge.peft.plan import AdapterPlan
from primus_bridge.together import writing_together

PREFIX = "base_model.model."
"""Of every tensor in a PEFT file."""
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def load_adapter(chunks: list, plan: AdapterPlan, reader: TensorReader, parallel) -> None:
    """Fill this rank's adapters from ``reader``, whose names are those of a PEFT file without PREFIX."""
    from primus_bridge.peft.build import adapter_parameters

    family = adapter_family(plan, parallel.tp_size)
    load_weights(adapter_parameters(chunks), reader, family, plan.arch, parallel.shards)


def adapter_config(
    plan: AdapterPlan, dropout: float, base: Optional[str], imported: Optional[Mapping[str, Any]] = None
) -> dict[str, Any]:
    """adapter_config.json, with the fields that PEFT and vLLM read.

    imported: the one that the adapter came with, which stays as it was; only the dropout is this run's, and its base,
    where that is a folder (of another machine, perhaps), is named anew.
    """
    if imported is not None:
        named = imported.get("base_model_name_or_path")
        keep = isinstance(named, str) and named and not is_folder(named)
        ours = {"base_model_name_or_path": named if keep else base, "lora_dropout": dropout, "inference_mode": True}
        return {**imported, **ours}
    rank, alpha = plan.usual
    modules = plan.modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in modules.items() if a != alpha},
        "lora_dropout": dropout,
        "target_modules": plan.target_modules,
        "bias": "none",
        "fan_in_fan_out": plan.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": plan.use_rslora,
        "use_dora": plan.use_dora,
    }


def export_adapter(
    chunks: list, plan: AdapterPlan, parallel, folder: Path, options: ExportOptions, config: Mapping[str, Any]
) -> None:
    """Write adapter_model.safetensors, adapter_config.json (``config``) and the tokenizer to ``folder``. Collective.

    Every rank writes its own part of the one file. The folder appears when it is complete. Raises ConfigError when
    the disk is full.
    """
    from primus_bridge.peft.build import adapter_parameters

    parameters = adapter_parameters(chunks)
    placed = list(placed_rules(adapter_family(plan, parallel.tp_size).rules, plan.arch))
    entries = {
        PREFIX + name: (options.of(one, name), shape)
        for one in placed
        for name, shape in one.hf_tensors(plan.arch).items()
    }
    prepared = partial_folder(folder)
    with writing_together("the adapter export", folder, remove=prepared):
        if parallel.rank == 0:
            check_export_folder(folder)
            shutil.rmtree(prepared, ignore_errors=True)
            prepared.mkdir(parents=True)
            copy_assets(options.assets, prepared)
            write_json(prepared / ADAPTER_CONFIG, dict(config))
            SafetensorsFile.create(prepared / ADAPTER_FILE, entries).close()
    with writing_together("the adapter export", folder, remove=prepared):
        if parallel.dp_rank == 0:
            with SafetensorsFile(prepared / ADAPTER_FILE, entries) as file:
                held = [one for one in placed if one.megatron in parameters]
                write_pieces(held, parameters, plan.arch, parallel.shards, dict.fromkeys(entries, file), PREFIX)
    with writing_together("the adapter export", folder, remove=prepared):
        if parallel.rank == 0:
            replace_folder(prepared, folder)
