"""Checks and derived values that need nothing but the arguments: no file is opened, and no heavy package imported."""

from __future__ import annotations

import math

from primus_bridge.config import names, schema
from primus_bridge.config.arguments import BridgeArguments, ModelArguments
from primus_bridge.config.follow import check_alternatives, follow_accumulation, steps_are_known
from primus_bridge.errors import ConfigError

POSITIVE = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.num_layers_in_first_pipeline_stage",
    "model.num_layers_in_last_pipeline_stage",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.expert_tensor_parallel_size",
    "model.seq_length",
    "model.recompute_num_layers",
    "model.make_vocab_size_divisible_by",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.train_iters",
    "train.num_epochs",
    "train.gradient_accumulation_steps",
    "train.eval_interval",
    "train.eval_iters",
    "train.max_nonfinite",
    "optimizer.lr",
    "optimizer.adam_eps",
    "scheduler.lr_decay_iters",
    "dataset.max_samples",
    "dataset.num_workers",
    "dataset.streaming_window",
    "train.neftune_noise_alpha",
    "checkpoint.save_interval",
    "checkpoint.hf_save_interval",
    "checkpoint.save_total_limit",
    "checkpoint.keep_every",
    "checkpoint.max_save_failures",
    "peft.dim",
    "peft.alpha",
    "logger.log_interval",
    "dist.distributed_timeout_minutes",
    "dist.nproc",
)
NOT_NEGATIVE = (
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "scheduler.lr_warmup_iters",
    "rng.seed",
    "dataset.prompt_loss_weight",
    "profiling.profile_step_start",
)
FRACTIONS = (
    "model.attention_dropout",
    "model.hidden_dropout",
    "optimizer.adam_beta1",
    "optimizer.adam_beta2",
    "scheduler.lr_warmup_fraction",
    "dataset.validation_split",
    "peft.dropout",
)


LARGEST_SEED = 2**62
"""Ranks and steps are added to it, and torch takes 63 bits."""


def validate(arguments: BridgeArguments) -> None:
    """Raise ConfigError, at the source of the value, for arguments that cannot make a run.

    Filled in place, with their source: recompute_method and recompute_num_layers of a full recompute. One virtual
    stage becomes none, and so does sequence parallelism without tensor parallelism.
    """
    validate_shape(arguments)
    _data(arguments)
    _weights(arguments)
    if arguments.logger.wandb is None and arguments.logger.wandb_project is None:
        for name in ("wandb_entity", "wandb_mode"):
            if getattr(arguments.logger, name) is not None:
                _note(arguments, f"logger.{name}", "without wandb_project nothing goes to Weights & Biases")


def validate_shape(arguments: BridgeArguments) -> None:
    """The part of ``validate`` that asks neither for data nor for weights: layout, batch, recompute, schedule."""
    _ranges(arguments)
    if arguments.model.virtual_pipeline_model_parallel_size == 1:
        arguments.model.virtual_pipeline_model_parallel_size = None  # one chunk a rank is no interleaving
    if arguments.rng.seed > LARGEST_SEED:
        raise _bad(arguments, "rng.seed", f"must not be above {LARGEST_SEED}")
    check_alternatives(arguments)
    _layout(arguments)
    _recompute(arguments)
    _offload(arguments)
    _profiling(arguments)
    check_schedule(arguments)


def layout_size(arguments: BridgeArguments) -> int:
    """The smallest number of ranks of a layout: tensor x pipeline x context, or more where the experts need it."""
    model = arguments.model
    pipeline = model.pipeline_model_parallel_size
    dense = model.tensor_model_parallel_size * model.context_parallel_size
    expert_tensor = model.expert_tensor_parallel_size or model.tensor_model_parallel_size
    return math.lcm(dense, expert_tensor * model.expert_model_parallel_size) * pipeline


def sequence_multiple(model: ModelArguments) -> int:
    """What the length of every micro-batch is a multiple of: context-parallel ranks hold two chunks each, of equal
    length, and sequence parallelism shares out what a rank holds."""
    chunks = 2 * model.context_parallel_size if model.context_parallel_size > 1 else 1
    return chunks * (model.tensor_model_parallel_size if model.sequence_parallel else 1)


def check_ranks(arguments: BridgeArguments, world_size: int, option: str = "--nproc") -> None:
    """Raise ConfigError when the layout does not divide over this many ranks; ``option`` sets their number."""
    model = arguments.model
    size = layout_size(arguments)
    layout = f"tensor {model.tensor_model_parallel_size} x pipeline {model.pipeline_model_parallel_size}"
    if model.context_parallel_size > 1:
        layout += f" x context {model.context_parallel_size}"
    if model.expert_model_parallel_size > 1:
        layout += f", expert {model.expert_model_parallel_size}"
        if model.expert_tensor_parallel_size:
            layout += f" x expert tensor {model.expert_tensor_parallel_size}"
    if world_size % size:
        raise ConfigError(
            f"{world_size} ranks do not divide into copies of the model of {size} ({layout}): "
            f"start a multiple of {size} ({option} {-(-world_size // size) * size}) or change the layout"
        )


def check_world(arguments: BridgeArguments, world_size: int, option: str = "--nproc") -> None:
    """Raise ConfigError when the layout or the batch does not divide over this many ranks, which ``option`` sets.

    Filled in place, with its source: global_batch_size where gradient_accumulation_steps stands for it.
    """
    check_ranks(arguments, world_size, option)
    model, train = arguments.model, arguments.train
    size = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    data_parallel = world_size // size
    follow_accumulation(arguments, data_parallel)
    step = train.micro_batch_size * data_parallel
    if train.global_batch_size % step:
        raise _bad(
            arguments,
            "train.global_batch_size",
            f"must be a multiple of micro_batch_size x data-parallel ranks = "
            f"{train.micro_batch_size} x {data_parallel} = {step}",
        )
    missing = [rank for rank in arguments.profiling.profile_ranks or () if rank >= world_size]
    if missing:
        raise _bad(arguments, "profiling.profile_ranks", f"names rank {missing[0]} of a run of {world_size} ranks")
    micro_batches = train.global_batch_size // step
    if model.virtual_pipeline_model_parallel_size and micro_batches % model.pipeline_model_parallel_size:
        raise _bad(
            arguments,
            "train.global_batch_size",
            f"gives {micro_batches} micro-batches a rank, and the interleaved pipeline schedule needs a multiple of "
            f"pipeline_model_parallel_size {model.pipeline_model_parallel_size}",
        )


def _bad(arguments: BridgeArguments, dotted: str, message: str) -> ConfigError:
    """'config.yaml:9: lr 5 must be ...' - or without a place for a default."""
    source = arguments.sources.get(dotted, "default")
    value = schema.shown(schema.get(arguments, dotted))
    return ConfigError(f"{dotted.rpartition('.')[2]} {value} {message}", where=None if source == "default" else source)


def _note(arguments: BridgeArguments, dotted: str, reason: str) -> None:
    """A value that somebody set and that changes nothing, for the run to say."""
    source = arguments.sources.get(dotted, "default")
    note = f"{source}: '{dotted.rpartition('.')[2]}' has no effect here: {reason}"
    if source != "default" and note not in arguments.notes:
        arguments.notes.append(note)


def _ranges(arguments: BridgeArguments) -> None:
    for group, fits, words in (
        (POSITIVE, lambda value: value > 0, "must be above 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "must not be below 0"),
        (FRACTIONS, lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ):
        for name in group:
            value = schema.get(arguments, name)
            if value is not None and not fits(value):
                null = ", or null" if value == 0 and schema.is_optional(schema.fields()[name]) else ""
                raise _bad(arguments, name, words + null)


def _layout(arguments: BridgeArguments) -> None:
    model, train = arguments.model, arguments.train
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        # a cluster's config tried on one rank
        _note(arguments, "model.sequence_parallel", "tensor_model_parallel_size is 1, there is nothing to shard over")
        model.sequence_parallel = False
    if model.seq_length % sequence_multiple(model):
        reasons = []
        if model.context_parallel_size > 1:
            reasons.append(f"2 x context_parallel_size {model.context_parallel_size}")
        if model.sequence_parallel:
            reasons.append(f"tensor_model_parallel_size {model.tensor_model_parallel_size} for sequence_parallel")
        raise _bad(arguments, "model.seq_length", f"must divide by {' x '.join(reasons)}")
    if model.virtual_pipeline_model_parallel_size and model.pipeline_model_parallel_size == 1:
        raise _bad(
            arguments, "model.virtual_pipeline_model_parallel_size", "needs pipeline_model_parallel_size above 1"
        )
    uneven = ("model.num_layers_in_first_pipeline_stage", "model.num_layers_in_last_pipeline_stage")
    for name in uneven:
        if schema.get(arguments, name) is None:
            continue
        if model.pipeline_model_parallel_size == 1:
            raise _bad(arguments, name, "needs pipeline_model_parallel_size above 1")
        if model.virtual_pipeline_model_parallel_size:
            raise _bad(arguments, name, "cannot be combined with virtual_pipeline_model_parallel_size in this version")
    if train.gradient_accumulation_steps is None and train.global_batch_size % train.micro_batch_size:
        raise _bad(
            arguments, "train.global_batch_size", f"must be a multiple of micro_batch_size {train.micro_batch_size}"
        )


def _recompute(arguments: BridgeArguments) -> None:
    model = arguments.model
    if model.recompute_granularity == "full":
        source = f"follows recompute_granularity ({arguments.sources.get('model.recompute_granularity', 'default')})"
        if model.recompute_method is None:
            schema.put(arguments, "model.recompute_method", "uniform", source)
        if model.recompute_num_layers is None:
            schema.put(arguments, "model.recompute_num_layers", 1, source)
        return
    for name in ("model.recompute_method", "model.recompute_num_layers"):
        if schema.get(arguments, name) is not None:
            raise _bad(arguments, name, "is for recompute_granularity: full only")


def _offload(arguments: BridgeArguments) -> None:
    optimizer = arguments.optimizer
    if not 0 <= optimizer.optimizer_offload_fraction <= 1:
        raise _bad(arguments, "optimizer.optimizer_offload_fraction", "must be between 0 and 1")
    if not optimizer.optimizer_cpu_offload:
        for name in ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"):
            _note(arguments, f"optimizer.{name}", "it belongs to optimizer_cpu_offload, which is off")
        return
    # Megatron's hybrid optimizer holds master weights of 16-bit parameters, in the distributed optimizer's slices
    for fits, mend in (
        (arguments.ddp.use_distributed_optimizer, "use_distributed_optimizer: true"),
        (arguments.mixed_precision == "bf16_mixed", "mixed_precision: bf16_mixed"),
    ):
        if not fits:
            raise _bad(arguments, "optimizer.optimizer_cpu_offload", f"needs {mend}")


def _profiling(arguments: BridgeArguments) -> None:
    profiling = arguments.profiling
    if profiling.profile_step_end <= profiling.profile_step_start:
        start = profiling.profile_step_start
        raise _bad(arguments, "profiling.profile_step_end", f"must be above profile_step_start {start}")
    if profiling.profile_ranks is not None and not all(rank >= 0 for rank in profiling.profile_ranks):
        raise _bad(arguments, "profiling.profile_ranks", "must be ranks, from 0")


def check_schedule(arguments: BridgeArguments) -> None:
    """The part of ``validate`` that asks how long a run is; again when train_iters follows from the data."""
    optimizer, scheduler, train = arguments.optimizer, arguments.scheduler, arguments.train
    if optimizer.min_lr > optimizer.lr:
        # the default lr can be the smaller one; the place to look is whichever the user wrote
        raise _bad(arguments, "optimizer.min_lr", f"must not be above lr {optimizer.lr}")
    if scheduler.lr_warmup_fraction is not None and scheduler.lr_warmup_iters:
        raise _bad(arguments, "scheduler.lr_warmup_fraction", "and lr_warmup_iters are both set: keep one")
    if scheduler.lr_decay_iters is None and not steps_are_known(arguments):
        return
    decay = scheduler.lr_decay_iters if scheduler.lr_decay_iters is not None else train.train_iters
    if scheduler.lr_warmup_iters and scheduler.lr_warmup_iters >= decay:
        what = "scheduler.lr_decay_iters" if scheduler.lr_decay_iters is not None else "train.train_iters"
        place = arguments.sources.get(what, "default")
        there = f"{what.partition('.')[2]} {decay}" + (f" ({place})" if place != "default" else "")
        raise _bad(arguments, "scheduler.lr_warmup_iters", f"must be below {there}: set lr_warmup_iters")
    source = arguments.sources.get("scheduler.lr_decay_iters", "default")
    if source.startswith("flavor ") and decay < train.train_iters:
        note = f"{source}: from step {decay} on the rate is min_lr; lr_decay_iters: null makes it follow train_iters"
        if note not in arguments.notes:
            arguments.notes.append(note)


def validate_data(arguments: BridgeArguments) -> None:
    """The part of ``validate`` that asks what the data is, for those who train on nothing."""
    _ranges(arguments)
    _data(arguments)


def _data(arguments: BridgeArguments) -> None:
    from primus_bridge.data.mixture import train_sources

    dataset = arguments.dataset
    if dataset.data_path is None and not dataset.sources:
        raise ConfigError(
            "no data: give data.data_path (--data_path), a JSON, JSONL, CSV, Parquet or Arrow file, a folder of them, "
            "or a hub id; or several of them as data.sources"
        )
    if dataset.data_path is not None and dataset.sources:
        raise _bad(arguments, "dataset.data_path", "and sources are both set: keep one")
    train_sources(dataset)
    if dataset.max_dropped_fraction < 0 or dataset.max_dropped_fraction > 1:
        raise _bad(arguments, "dataset.max_dropped_fraction", "must be between 0 and 1")
    if dataset.validation_data_path is not None and dataset.validation_split:
        raise _bad(arguments, "dataset.validation_split", "and validation_data_path are both set: keep one")
    if dataset.streaming and dataset.validation_split:
        raise _bad(
            arguments,
            "dataset.validation_split",
            "needs the whole set, and streaming never has it: give validation_data_path",
        )
    if dataset.streaming and arguments.train.num_epochs is not None:
        raise _bad(
            arguments, "train.num_epochs", "needs the number of sequences, which streaming never has: give train_iters"
        )
    _format_and_template(arguments)
    has_validation = dataset.validation_data_path is not None or dataset.validation_split > 0
    for name in ("train.eval_interval", "train.eval_iters"):
        if schema.get(arguments, name) is not None and not has_validation:
            _note(arguments, name, "there is no validation_split nor validation_data_path")


def _format_and_template(arguments: BridgeArguments) -> None:
    dataset, pretrain = arguments.dataset, arguments.stage == "pretrain"
    for name in (names.FORMAT, names.TEMPLATE):
        try:
            names.checked(name, schema.get(arguments, name))
        except ValueError as error:
            raise _bad(arguments, name, str(error)) from None
    if not pretrain and dataset.dataset_format == "text":
        raise _bad(arguments, "dataset.dataset_format", "is for stage pretrain: rows of plain text have no answers")
    if pretrain and dataset.dataset_format not in ("auto", "text"):
        raise _bad(arguments, "dataset.dataset_format", "is for stage sft; pretraining reads rows with a 'text' column")
    custom = [name for name in ("custom_format", "format_function") if getattr(dataset, name)]
    if dataset.dataset_format == "custom" and len(custom) != 1:
        raise _bad(arguments, "dataset.dataset_format", "needs custom_format or format_function: give one of them")
    if custom and dataset.dataset_format != "custom" and not dataset.sources:
        raise _bad(arguments, f"dataset.{custom[0]}", "is for dataset_format: custom")
    if pretrain:
        for name in ("prompt_template", "loss_on", "prompt_loss_weight", "enable_thinking"):
            if getattr(dataset, name) != getattr(type(dataset), name, None):
                _note(arguments, f"dataset.{name}", "pretraining has no template and a loss on every token")


def _weights(arguments: BridgeArguments) -> None:
    checkpoint, dist = arguments.checkpoint, arguments.dist
    if dist.device == "cpu" and dist.distributed_backend == "nccl":
        raise _bad(arguments, "dist.distributed_backend", "needs GPUs, and device is cpu: leave it out, or write gloo")
    if checkpoint.save is None:
        raise ConfigError(
            "no place for the run: give checkpointing.save (--save), a folder for checkpoints and metrics"
        )
    if arguments.train.on_nonfinite == "rollback" and not checkpoint.save_optim:
        raise _bad(
            arguments,
            "train.on_nonfinite",
            "goes back to checkpoints with a training state, and save_optim is false: set it, or choose skip",
        )
    if checkpoint.convert_from_hf and checkpoint.hf_model_name_or_path is None:
        raise _bad(
            arguments, "checkpoint.convert_from_hf", "needs hf_model_name_or_path: a Hugging Face folder or hub id"
        )
    megatron = checkpoint.load or checkpoint.pretrained_checkpoint
    goes_on = f"a run whose checkpoints are in save goes on with --load {checkpoint.save}"
    if checkpoint.hf_model_name_or_path is None and not megatron:
        raise ConfigError(
            "no model: give hf_model_name_or_path (a Hugging Face folder or hub id, with convert_from_hf: true to "
            f"start from its weights), or model.load (--load), a Megatron checkpoint; {goes_on}"
        )
    if arguments.stage == "sft" and not checkpoint.convert_from_hf and not megatron:
        raise ConfigError(
            "nothing to fine-tune, the weights would be random: add convert_from_hf: true (--convert_from_hf) to read "
            f"those of hf_model_name_or_path, or model.load (--load), a Megatron checkpoint; {goes_on}"
        )
    if not checkpoint.convert_to_hf:
        for name in ("hf_save_path", "hf_save_interval", "save_merged_model", "max_shard_size"):
            if getattr(checkpoint, name):
                _note(arguments, f"checkpoint.{name}", "nothing is exported without convert_to_hf")
    elif checkpoint.hf_save_interval and checkpoint.hf_save_interval % (checkpoint.save_interval or math.inf):
        raise _bad(
            arguments,
            "checkpoint.hf_save_interval",
            f"must be a multiple of save_interval {checkpoint.save_interval}: an export follows a checkpoint",
        )
    if checkpoint.convert_from_hf and checkpoint.load is not None and arguments.peft.scheme is None:
        _note(arguments, "checkpoint.convert_from_hf", "the weights come from load, or from save where a run goes on")
    if checkpoint.finetune and not (megatron or checkpoint.convert_from_hf):
        raise _bad(arguments, "checkpoint.finetune", "takes its weights from load or pretrained_checkpoint: set one")
    if checkpoint.convert_from_hf and checkpoint.pretrained_checkpoint is not None:
        raise _bad(arguments, "checkpoint.pretrained_checkpoint", "and convert_from_hf are both set: keep one")
    if arguments.peft.scheme is not None and not arguments.peft.target_modules:
        raise _bad(arguments, "peft.target_modules", "is empty: name the modules that get an adapter")
    if checkpoint.save_merged_model and arguments.peft.scheme is None:
        raise _bad(arguments, "checkpoint.save_merged_model", "is for LoRA runs: a full fine-tuning is merged already")
