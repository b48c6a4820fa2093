"""What a run has trained, as it is now, as a Hugging Face folder: the model, or the adapter and the model merged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from primus_bridge.trainers.base import BaseTrainer


def export_run(run: BaseTrainer, folder: Path) -> None:
    """Write it to ``folder``; the merged model, when it is asked for, to merged/ in there. Collective."""
    from primus_bridge.conversion.adapters import adapter_config, export_adapter
    from primus_bridge.conversion.export import ExportOptions, export_model
    from primus_bridge.conversion.hf_folder import parse_size
    from primus_bridge.megatron.model import params_dtype
    from primus_bridge.megatron.names import global_parameters
    from primus_bridge.megatron.optimizer import unwrapped
    from primus_bridge.megatron.parallel import wait_for_queued

    wait_for_queued()
    checkpoint, model = run.arguments.checkpoint, run.start.model
    options = ExportOptions(run.assets, params_dtype(run.arguments), parse_size(checkpoint.max_shard_size))
    chunks = unwrapped(run.chunks)
    if run.lora is None:
        export_model(global_parameters(chunks), model.family, model.architecture, run.parallel, folder, options)
        return
    from primus_bridge.peft.merge import MergedParameters

    plan, imported = run.lora.plan, (run.start.adapter or {}).get("config")
    config = adapter_config(plan, run.arguments.peft.dropout, run.start.base_name, imported)
    export_adapter(chunks, plan, run.parallel, folder, options, config)
    if checkpoint.save_merged_model:
        merged = MergedParameters(chunks)
        export_model(merged, model.family, model.architecture, run.parallel, folder / "merged", options)
