"""What each argument is in Megatron-Bridge's ConfigContainer, for each version of it that is known. Imports nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Union

from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.follow import steps_are_known
from primus_bridge.errors import ConfigError


@dataclass(frozen=True)
class To:
    """The same thing there: fields as section.name; ``make`` gives their value where it is not the argument's own."""

    fields: tuple[str, ...]
    make: Optional[Callable[[BridgeArguments], Any]] = None


@dataclass(frozen=True)
class Ours:
    """Done by our half of the run, before or beside theirs, or by what container.py chooses; ``how`` says where."""

    how: str


@dataclass(frozen=True)
class Unused:
    """Changes nothing with this engine; a note of the run says why when somebody set it."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """What the engine cannot take: an error at any value but the default."""

    reason: str


Entry = Union[To, Ours, Unused, Refused]


def same(*names: str) -> dict[str, Entry]:
    """Arguments whose section and name are the container's own."""
    return {name: To((name,)) for name in names}


def has_validation(arguments: BridgeArguments) -> bool:
    return arguments.dataset.validation_data_path is not None or arguments.dataset.validation_split > 0


def _train_iters(arguments: BridgeArguments) -> Optional[int]:
    return arguments.train.train_iters if steps_are_known(arguments) else None


def _eval_interval(arguments: BridgeArguments) -> Optional[int]:
    # their loop evaluates at multiples and once more at the end: a multiple that never comes leaves the one at the end
    steps = _train_iters(arguments)
    return arguments.train.eval_interval or (None if steps is None else steps + 1)


def _eval_iters(arguments: BridgeArguments) -> Optional[int]:
    return arguments.train.eval_iters if has_validation(arguments) else 0


def _wandb_project(arguments: BridgeArguments) -> Optional[str]:
    logger = arguments.logger
    if not logger.uses_wandb:
        return None
    return logger.wandb_project or os.environ.get("WANDB_PROJECT", "uncategorized")


def _wandb_name(arguments: BridgeArguments) -> Optional[str]:
    project = _wandb_project(arguments)
    return (arguments.logger.wandb_exp_name or arguments.save_folder.absolute().name) if project else None


def _profile_ranks(arguments: BridgeArguments) -> list[int]:
    ranks = arguments.profiling.profile_ranks
    return list(range(int(os.environ.get("WORLD_SIZE", arguments.dist.nproc or 1)))) if ranks is None else ranks


SAMPLES = Ours("our tokens and loss masks are given to it (samples.py)")
CHOICE = Ours("chooses what runs")
WEIGHTS = Ours("AutoBridge makes a checkpoint of the Hugging Face weights first (weights.py)")
STREAM = Refused("engine bridge asks for samples by their number, which a stream does not have")
UNKNOWN = Refused("engine bridge has no such thing; engine: core does")
LOOP = Refused("engine bridge has its own training loop, which does not know it; engine: core does")
TURBO = Unused("engine bridge runs Transformer Engine's kernels")
EXPORT = Ours("AutoBridge exports the last checkpoint (weights.py)")

FIELDS_0_3: Mapping[str, Entry] = {
    "framework": CHOICE,
    "engine": CHOICE,
    "stage": CHOICE,
    **same(
        "model.tensor_model_parallel_size",
        "model.pipeline_model_parallel_size",
        "model.virtual_pipeline_model_parallel_size",
        "model.num_layers_in_first_pipeline_stage",
        "model.num_layers_in_last_pipeline_stage",
        "model.context_parallel_size",
        "model.expert_model_parallel_size",
        "model.expert_tensor_parallel_size",
        "model.sequence_parallel",
    ),
    "model.seq_length": To(("model.seq_length", "dataset.seq_length")),
    **same(
        "model.recompute_granularity",
        "model.recompute_method",
        "model.recompute_num_layers",
        "model.attention_dropout",
        "model.hidden_dropout",
    ),
    "model.enable_primus_turbo": TURBO,
    "model.use_turbo_attention": TURBO,
    "model.use_turbo_rms_norm": TURBO,
    "model.make_vocab_size_divisible_by": Unused("engine bridge does not pad the vocabulary of a Hugging Face model"),
    **same("train.micro_batch_size", "train.global_batch_size"),
    "train.train_iters": To(("train.train_iters",), _train_iters),
    "train.num_epochs": Ours("train_iters follows from the number of sequences"),
    "train.gradient_accumulation_steps": Ours("global_batch_size follows from the ranks"),
    "train.eval_interval": To(("train.eval_interval",), _eval_interval),
    "train.eval_iters": To(("train.eval_iters",), _eval_iters),
    "train.neftune_noise_alpha": LOOP,
    "train.on_nonfinite": LOOP,
    "train.max_nonfinite": Unused("it belongs to on_nonfinite"),
    "train.exit_after_save": LOOP,
    **same("optimizer.lr", "optimizer.min_lr"),
    "optimizer.weight_decay": To(
        ("optimizer.weight_decay", "scheduler.start_weight_decay", "scheduler.end_weight_decay")
    ),
    **same("optimizer.adam_beta1", "optimizer.adam_beta2", "optimizer.adam_eps", "optimizer.clip_grad"),
    # Megatron offloads the states that its precision-aware optimizer holds
    "optimizer.optimizer_cpu_offload": To(
        ("optimizer.optimizer_cpu_offload", "optimizer.use_precision_aware_optimizer")
    ),
    **same("optimizer.optimizer_offload_fraction", "optimizer.overlap_cpu_optimizer_d2h_h2d"),
    **same(
        "scheduler.lr_decay_style",
        "scheduler.lr_decay_iters",
        "scheduler.lr_warmup_iters",
        "scheduler.lr_warmup_fraction",
    ),
    "ddp.use_distributed_optimizer": To(("ddp.use_distributed_optimizer", "optimizer.use_distributed_optimizer")),
    "ddp.overlap_grad_reduce": To(("ddp.overlap_grad_reduce",)),
    "ddp.grad_reduce_in_fp32": To(("ddp.grad_reduce_in_fp32", "mixed_precision.grad_reduce_in_fp32")),
    "dataset.data_path": SAMPLES,
    "dataset.sources": SAMPLES,
    "dataset.dataset_format": SAMPLES,
    "dataset.columns": SAMPLES,
    "dataset.custom_format": SAMPLES,
    "dataset.format_function": SAMPLES,
    "dataset.oasst_paths": SAMPLES,
    "dataset.languages": SAMPLES,
    "dataset.include_unreviewed": SAMPLES,
    "dataset.bad_rows": SAMPLES,
    "dataset.prompt_template": SAMPLES,
    "dataset.custom_template": SAMPLES,
    "dataset.enable_thinking": SAMPLES,
    "dataset.loss_on": SAMPLES,
    "dataset.prompt_loss_weight": Refused("engine bridge counts whole tokens in its loss; engine: core has weights"),
    "dataset.split": SAMPLES,
    "dataset.streaming": STREAM,
    "dataset.streaming_window": STREAM,
    "dataset.validation_data_path": SAMPLES,
    "dataset.validation_data_split": SAMPLES,
    "dataset.validation_split": SAMPLES,
    "dataset.max_samples": SAMPLES,
    "dataset.truncation": SAMPLES,
    "dataset.max_dropped_fraction": SAMPLES,
    "dataset.packed_sequence": SAMPLES,
    "dataset.pad_to": SAMPLES,
    "dataset.alpaca_response_newline": SAMPLES,
    "dataset.shuffle": SAMPLES,
    "dataset.num_workers": SAMPLES,
    "checkpoint.save": To(("checkpoint.save",)),
    "checkpoint.load": Ours("checkpoint.load or checkpoint.pretrained_checkpoint, by what it holds (weights.py)"),
    "checkpoint.pretrained_checkpoint": Ours("checkpoint.pretrained_checkpoint (weights.py)"),
    "checkpoint.finetune": Ours("load becomes checkpoint.pretrained_checkpoint (weights.py)"),
    "checkpoint.save_interval": To(("checkpoint.save_interval",)),
    "checkpoint.save_total_limit": To(
        ("checkpoint.most_recent_k",), lambda arguments: arguments.checkpoint.save_total_limit or -1
    ),
    "checkpoint.keep_every": Refused("engine bridge keeps the newest checkpoints only; engine: core keeps others too"),
    "checkpoint.save_optim": To(("checkpoint.save_optim",)),
    "checkpoint.async_save": To(("checkpoint.async_save",)),
    "checkpoint.max_save_failures": Unused("engine bridge ends at the first save that fails"),
    "checkpoint.validation_level": Unused("engine bridge does not compare replicas"),
    "checkpoint.verify_checksums": Unused("engine bridge writes no checksums"),
    "checkpoint.force_resume": Unused("engine bridge compares nothing when it resumes"),
    "checkpoint.convert_from_hf": WEIGHTS,
    "checkpoint.hf_model_name_or_path": WEIGHTS,
    "checkpoint.convert_to_hf": EXPORT,
    "checkpoint.hf_save_path": EXPORT,
    "checkpoint.hf_save_interval": LOOP,
    "checkpoint.max_shard_size": Unused("AutoBridge writes the files that the model came in"),
    "checkpoint.save_merged_model": Refused("engine bridge has no export of adapters here; engine: core does"),
    "peft.scheme": Ours("chooses LoRA, CanonicalLoRA or DoRA (adapters.py)"),
    **same("peft.dim", "peft.alpha", "peft.dropout", "peft.lora_A_init_method"),
    "peft.target_modules": Ours("Megatron's names of the same linears (adapters.py)"),
    "peft.use_rslora": Refused("engine bridge scales by alpha / rank only; engine: core has it"),
    "peft.use_dora": Ours("chooses DoRA (adapters.py)"),
    "logger.log_interval": To(("logger.log_interval",)),
    "logger.tensorboard": To(
        ("logger.tensorboard_dir",),
        lambda arguments: str(arguments.save_folder / "tensorboard") if arguments.logger.tensorboard else None,
    ),
    "logger.progress": Unused("engine bridge prints lines of its own"),
    "logger.report": Unused("the report is made of the core engine's metrics"),
    "logger.wandb": Ours("logger.wandb_project is set, or not"),
    "logger.wandb_project": To(("logger.wandb_project",), _wandb_project),
    "logger.wandb_entity": To(("logger.wandb_entity",)),
    "logger.wandb_exp_name": To(("logger.wandb_exp_name",), _wandb_name),
    "logger.wandb_mode": Ours("WANDB_MODE of the ranks"),
    "logger.callbacks": LOOP,
    **same(
        "profiling.use_pytorch_profiler",
        "profiling.profile_step_start",
        "profiling.profile_step_end",
        "profiling.record_shapes",
    ),
    "profiling.profile_ranks": To(("profiling.profile_ranks",), _profile_ranks),
    "rng.seed": To(("rng.seed",)),
    "dist.distributed_backend": To(
        ("dist.distributed_backend",), lambda arguments: arguments.dist.distributed_backend or "nccl"
    ),
    "dist.distributed_timeout_minutes": To(("dist.distributed_timeout_minutes",)),
    "dist.nproc": CHOICE,
    "dist.device": CHOICE,
    "tokenizer.tokenizer_model": To(("tokenizer.tokenizer_model",)),
    "mixed_precision": Ours("MixedPrecisionConfig of that name (container.py)"),
}

# what no argument says, and what makes the two engines' losses the same: a sum over tokens by their global count,
# with gradients summed, not averaged
FIXED_0_3: Mapping[str, Any] = {
    "model.calculate_per_token_loss": True,
    "ddp.average_in_collective": False,
    "scheduler.override_opt_param_scheduler": True,
    "checkpoint.ckpt_format": "torch_dist",
    "checkpoint.dist_ckpt_optim_fully_reshardable": True,
    "train.exit_signal_handler": True,
    "tokenizer.tokenizer_type": "HuggingFaceTokenizer",
    "dataset.dataloader_type": "single",
    "dataset.num_workers": 0,
}


@dataclass(frozen=True)
class Table:
    """One version of Megatron-Bridge: its versions, section -> class of megatron.bridge.training.config, the fields."""

    versions: str
    python: str
    sections: Mapping[str, str]
    fields: Mapping[str, Entry]
    fixed: Mapping[str, Any]


SECTIONS_0_3 = {
    "train": "TrainingConfig",
    "optimizer": "OptimizerConfig",
    "scheduler": "SchedulerConfig",
    "ddp": "DistributedDataParallelConfig",
    "checkpoint": "CheckpointConfig",
    "logger": "LoggerConfig",
    "profiling": "ProfilingConfig",
    "rng": "RNGConfig",
    "dist": "DistributedInitConfig",
    "tokenizer": "TokenizerConfig",
}

TABLES = (
    Table(">=0.3,<0.4", "3.11", SECTIONS_0_3, FIELDS_0_3, FIXED_0_3),
    Table(
        ">=0.6,<0.7",
        "3.12",
        {**SECTIONS_0_3, "validation": "ValidationConfig"},
        {
            **FIELDS_0_3,
            "train.eval_interval": To(("validation.eval_interval",), _eval_interval),
            "train.eval_iters": To(("validation.eval_iters",), _eval_iters),
        },
        {**FIXED_0_3, "dataset.persistent_workers": False},
    ),
)


def table_of(version: str) -> Table:
    """The table of a version of Megatron-Bridge. Raises ConfigError, with the known ones, for another."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    for table in TABLES:
        if SpecifierSet(table.versions).contains(Version(Version(version).base_version)):
            return table
    known = ", ".join(f"{table.versions} (Python {table.python})" for table in TABLES)
    raise ConfigError(
        f"engine bridge knows megatron-bridge {known}, and {version} is installed: install one of these, "
        "or leave --engine out to run on Megatron-Core directly"
    )


def check_fields(arguments: BridgeArguments, table: Table) -> None:
    """Raises ConfigError, at its source, for an argument that the engine cannot take; notes what has no effect."""
    usual = BridgeArguments()
    for name in schema.fields():
        entry, value = table.fields.get(name, UNKNOWN), schema.get(arguments, name)
        if isinstance(entry, (To, Ours)) or value == schema.get(usual, name):
            continue
        source = arguments.sources.get(name, "default")
        if isinstance(entry, Refused):
            raise refusal(arguments, name, entry.reason)
        note = f"{source}: '{name.rpartition('.')[2]}' has no effect here: {entry.reason}"
        if note not in arguments.notes:
            arguments.notes.append(note)


def refusal(arguments: BridgeArguments, name: str, reason: str) -> ConfigError:
    """'run.yaml:9: 'streaming' cannot be true with engine bridge: ...'"""
    source = arguments.sources.get(name, "default")
    value = schema.get(arguments, name)
    shown = ",".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else None
    return ConfigError(
        f"'{name.rpartition('.')[2]}' cannot be {shown or schema.shown(value)} with engine bridge: {reason}",
        where=None if source == "default" else source,
    )
