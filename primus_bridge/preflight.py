"""Checks before anything is started or written: model folder, checkpoint, layout, adapters, data and output folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Optional

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from primus_bridge.bridge.start import Start
    from primus_bridge.checkpoint.start import Damage, StartingPoint
    from primus_bridge.conversion.architecture import Architecture
    from primus_bridge.conversion.model_folder import HFModel


SHAPE = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
    "norm_epsilon": "layernorm_epsilon",
    "rotary_base": "rope.base",
    "num_experts": "moe.num_experts",
    "moe_router_topk": "moe.top_k",
    "moe_ffn_hidden_size": "moe.ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "moe.shared_ffn_hidden_size",
    "q_lora_rank": "mla.q_lora_rank",
    "kv_lora_rank": "mla.kv_lora_rank",
    "qk_head_dim": "mla.qk_nope_head_dim",
    "qk_pos_emb_head_dim": "mla.qk_rope_head_dim",
    "v_head_dim": "mla.v_head_dim",
    "init_method_std": "init_std",
}
"""What a config may say of the model's shape, in Megatron's words -> the architecture's."""


def export_folder(arguments: BridgeArguments) -> Path:
    """Where convert_to_hf writes."""
    return Path(arguments.checkpoint.hf_save_path or arguments.save_folder / "hf")


def check_run(arguments: BridgeArguments) -> None:
    """``check``, of the engine that runs the arguments."""
    if arguments.engine == "bridge":
        check_bridge(arguments)
    else:
        check(arguments)


def check_bridge(arguments: BridgeArguments, weights: bool = True) -> Start:
    """``check`` for engine bridge, with what that cannot take; returns where it starts.

    weights: False leaves those of the Hugging Face model out, where they need not be.
    """
    from primus_bridge.bridge.check import check_engine
    from primus_bridge.checkpoint.manifest import check_save_folder

    check_save_folder(arguments.save_folder, "the save folder")
    start = check_engine(arguments, weights)
    _check_parts(arguments, start.model)
    if start.imports and weights:
        start.model.weights()
    return start


def check(arguments: BridgeArguments, damaged: Optional[Damage] = None) -> StartingPoint:
    """Raises ConfigError for what would stop the run later. Reads headers and small files only; writes nothing.

    damaged: checkpoints that were found so, and are passed over. Returns where the run starts.
    """
    from primus_bridge.callbacks.build import check_callbacks
    from primus_bridge.checkpoint.manifest import check_save_folder
    from primus_bridge.checkpoint.start import starting_point

    check_save_folder(arguments.save_folder, "the save folder")
    check_callbacks(arguments)
    start = starting_point(arguments, damaged=damaged)
    _check_parts(arguments, start.model)
    if start.hf_weights:
        start.model.weights()
    if arguments.peft.scheme is not None:
        from primus_bridge.peft.plan import adapter_plan

        adapter_plan(arguments.peft, start.model, start.adapter)
    return start


def _check_parts(arguments: BridgeArguments, model: HFModel) -> None:
    """What any engine asks of the export's folder, the layout and the data."""
    from primus_bridge.conversion.hf_folder import check_export_folder, parse_size
    from primus_bridge.data.pipeline import open_sources

    checkpoint = arguments.checkpoint
    if checkpoint.convert_to_hf:
        parse_size(checkpoint.max_shard_size)
        apart = {
            "the run's save folder": arguments.save_folder,
            "the checkpoint": checkpoint.load,
            "the pretrained checkpoint": checkpoint.pretrained_checkpoint,
            "the model": model.folder,
        }
        check_export_folder(export_folder(arguments), apart)
        if checkpoint.hf_save_interval:
            for folder in export_folder(arguments).parent.glob(export_folder(arguments).name + "_iter_*"):
                check_export_folder(folder)
    fit_to_model(arguments, model.architecture)
    open_sources(arguments)  # opening them checks that they are there


def _check_shape(arguments: BridgeArguments, arch: Architecture) -> None:
    """Raises ConfigError where a config says of the shape what config.json does not."""
    from primus_bridge.config import schema

    checkpoint = arguments.checkpoint
    weights = checkpoint.convert_from_hf or checkpoint.load or checkpoint.pretrained_checkpoint
    unasked = {"init_method_std"} if weights or arguments.stage == "sft" else set()
    if arch.mla is not None:  # heads have sizes of their own there, and no groups
        unasked |= {"num_query_groups", "kv_channels"}
    if arch.moe is not None and all(arch.moe.layers):
        unasked.add("ffn_hidden_size")
    for name, (value, where) in arguments.shape.items():
        part, _, field = SHAPE[name].rpartition(".")
        owner = getattr(arch, part) if part else arch
        # a base preset of Primus's has sizes of parts that the model does not have
        if name in unasked or (owner is None and name != "num_experts"):
            continue
        theirs = getattr(owner, field, 0)
        if value != theirs:
            there = schema.shown(theirs)
            raise ConfigError(
                f"'{name}' is {value}, and {there} in the model's config.json, which is what is trained: "
                f"leave it out, or write {there}",
                where=where,
            )


def fit_to_model(arguments: BridgeArguments, arch: Architecture) -> None:
    """What a model asks of the arguments. Filled in place, with its source: sequence parallelism beside experts."""
    from primus_bridge.config import schema
    from primus_bridge.conversion.model_folder import check_layout

    model = arguments.model
    check_layout(arch, model)
    _check_shape(arguments, arch)
    if model.use_turbo_attention or model.use_turbo_rms_norm:
        from primus_bridge.megatron.turbo import note_unused_kernels

        note_unused_kernels(arguments, arch)
    tensor, where = model.tensor_model_parallel_size, arguments.sources.get("model.seq_length")
    where = None if where == "default" else where
    if arch.rope is None and model.seq_length > arch.max_position_embeddings:
        raise ConfigError(
            f"seq_length {model.seq_length} is above the {arch.max_position_embeddings} positions that the model has "
            "learned; lower it",
            where=where,
        )
    if arch.moe is not None and tensor > 1 and not model.sequence_parallel:
        if model.seq_length % tensor:
            raise ConfigError(
                f"seq_length {model.seq_length} must divide by tensor_model_parallel_size {tensor}: experts with "
                "tensor parallelism need sequence parallelism",
                where=where,
            )
        source = "follows the model: experts with tensor parallelism need it"
        schema.put(arguments, "model.sequence_parallel", True, source)
