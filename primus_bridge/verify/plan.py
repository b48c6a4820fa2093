"""What is compared with what: the options of ``primus verify``, and all that follows from them before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.validate import check_ranks
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family, family_of
from primus_bridge.conversion.hf_folder import read_config, resolve
from primus_bridge.conversion.model_folder import HFModel, check_layout
from primus_bridge.errors import ConfigError
from primus_bridge.verify.reference import upstream_deviations
from primus_bridge.verify.shrink import SEQ_LENGTH, layer_kinds, shrunk_config

ROWS = 4
USUAL_LENGTH = 128
LONGEST_LENGTH = {"cpu": 1024, "cuda": 8192}
"""Of the sequences chosen here, to reach past a window or an original context length."""
FP32_TOLERANCE = 1e-5
"""Of one layer. Rounding differences of layers add up like a random walk, so a model of n layers gets sqrt(n) of it."""
BF16_TOLERANCE = 0.15
"""Gradients of norms and biases, which transformers sums in bf16, differ by up to 0.08; depth hardly matters."""


@dataclass(frozen=True)
class Options:
    """As the command line has them. against: another model folder, whose weights transformers uses instead of hf's.

    None: chosen here (make_plan): expert_tensor_parallel_size as tensor_model_parallel_size, and the rest by the model.
    """

    hf: str
    against: Optional[str] = None
    shrink: bool = False
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: Optional[int] = None
    sequence_parallel: bool = False
    seq_length: Optional[int] = None
    batch: Optional[int] = None
    dtype: str = "fp32"
    tolerance: Optional[float] = None
    seed: int = 1234
    device: Optional[str] = None


@dataclass(frozen=True)
class Plan:
    """folder: of Megatron's weights; reference: of transformers'. Both None where config is a shrunk one to be made."""

    options: Options
    folder: Optional[Path]
    reference: Optional[Path]
    config: dict[str, Any]
    family: Family
    architecture: Architecture
    arguments: BridgeArguments
    ranks: int
    rows: int
    tolerance: float
    notes: list[str] = field(default_factory=list)

    @property
    def seq_length(self) -> int:
        return self.arguments.model.seq_length

    @property
    def parameters(self) -> int:
        from primus_bridge.conversion.rules import expected_hf_tensors

        return sum(math.prod(shape) for shape in expected_hf_tensors(self.family.rules, self.architecture).values())


def make_plan(options: Options, ranks: Optional[int] = None, cuda: bool = False) -> Plan:
    """Check everything that is cheap to check; ranks None: as many as the layout needs. Reads headers only.

    Raises ConfigError for whatever is wrong with the folders, the layout or a number.
    """
    notes: list[str] = []
    _check_numbers(options)
    arguments = arguments_of(options)
    if options.shrink and options.against:
        raise ConfigError("--shrink makes one random model, there is nothing to hold --against it: keep one of the two")
    if options.shrink:
        folder = reference = None
        config, family, arch = _shrunk(options, arguments, notes)
    else:
        model = HFModel.open(options.hf, weights=True)
        other = HFModel.open(options.against, weights=True) if options.against else model
        _check_alike(model, other)
        for each in {model.folder: model, other.folder: other}.values():
            each.weights()
        folder, reference = model.folder, other.folder
        config, family, arch = model.architecture.hf_config, model.family, model.architecture
    check_layout(arch, arguments.model)
    from primus_bridge.config.validate import layout_size

    ranks = ranks or layout_size(arguments)
    check_ranks(arguments, ranks)
    _choose_sequence_parallel(arguments, arch, notes)
    arguments.model.seq_length = _seq_length(options, arguments, arch, cuda, notes)
    copies = ranks // (options.tensor_model_parallel_size * options.pipeline_model_parallel_size)
    rows = options.batch or math.lcm(copies, ROWS)
    if rows % copies:
        raise ConfigError(f"--batch {rows} does not divide over {copies} data-parallel ranks")
    arguments.train.global_batch_size, arguments.train.micro_batch_size = rows, rows // copies
    tolerance = FP32_TOLERANCE * math.sqrt(arch.num_layers) if options.dtype == "fp32" else BF16_TOLERANCE
    if arch.moe is not None and options.dtype != "fp32":
        notes.append(
            f"experts in {options.dtype}: rounding decides near ties between them, which fall differently on the two "
            "sides; a difference from the first layer with experts on need not be an error"
        )
    notes += upstream_deviations(arch)
    tolerance = options.tolerance or tolerance
    return Plan(options, folder, reference, config, family, arch, arguments, ranks, rows, tolerance, notes)


def _check_numbers(options: Options) -> None:
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "seq_length",
        "batch",
        "tolerance",
    ):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} must be above 0, got {value}")
    if options.seq_length is not None and options.seq_length < 8:
        raise ConfigError(f"--seq_length must be at least 8, got {options.seq_length}")
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"--seed must be from 0 to 2^32 - 1, got {options.seed}")


def arguments_of(options: Options) -> BridgeArguments:
    """The layout and precision of the options; make_plan completes them."""
    arguments = BridgeArguments()
    model = arguments.model
    model.tensor_model_parallel_size = options.tensor_model_parallel_size
    model.pipeline_model_parallel_size = options.pipeline_model_parallel_size
    model.expert_model_parallel_size = options.expert_model_parallel_size
    model.expert_tensor_parallel_size = options.expert_tensor_parallel_size
    model.sequence_parallel = options.sequence_parallel
    arguments.mixed_precision = "bf16_mixed" if options.dtype == "bf16" else "fp32"
    # every rank then holds the whole gradient of its parameters
    arguments.ddp.use_distributed_optimizer = False
    arguments.rng.seed = options.seed
    arguments.dist.device = options.device  # type: ignore[assignment]
    # the ranks wait while the first one runs the whole model in transformers
    arguments.dist.distributed_timeout_minutes = 24 * 60
    return arguments


def _shrunk(
    options: Options, arguments: BridgeArguments, notes: list[str]
) -> tuple[dict[str, Any], Family, Architecture]:
    folder = resolve(options.hf, weights=False)
    whole = read_config(folder)
    where = str(folder / "config.json")
    family = family_of(whole, where)
    model = arguments.model
    try:
        arch = family.architecture(whole)
        # the whole model's answer to the layout, but for its layers, of which the small one has as many as it takes
        stages, model.pipeline_model_parallel_size = model.pipeline_model_parallel_size, 1
        check_layout(arch, model)
        model.pipeline_model_parallel_size = stages
        config = shrunk_config(
            whole,
            family.architecture,
            tensor=options.tensor_model_parallel_size,
            pipeline=stages,
            expert=options.expert_model_parallel_size,
            expert_tensor=options.expert_tensor_parallel_size or options.tensor_model_parallel_size,
            seq_length=options.seq_length or SEQ_LENGTH,
        )
        small = family.architecture(config)
    except ConfigError as error:
        raise ConfigError(error.message, where=where) from None
    if set(layer_kinds(arch)) != set(layer_kinds(small)):
        notes.append(f"the shrunk model's {small.num_layers} layers do not have every kind of the whole one's")
    return config, family, small


def _check_alike(model: HFModel, other: HFModel) -> None:
    ours, theirs = model.architecture, other.architecture
    for name in ("model_type", "num_layers", "hidden_size", "vocab_size"):
        mine, its = getattr(ours, name), getattr(theirs, name)
        if mine != its:
            raise ConfigError(f"--against {other.name}: its {name} is {its}, that of {model.name} {mine}")


def _choose_sequence_parallel(arguments: BridgeArguments, arch: Architecture, notes: list[str]) -> None:
    model = arguments.model
    if model.tensor_model_parallel_size == 1:
        if model.sequence_parallel:
            notes.append("--sequence_parallel has no effect: there is no tensor parallelism to shard over")
        model.sequence_parallel = False
    elif arch.moe is not None and not model.sequence_parallel:
        notes.append("sequence parallelism is on: Megatron-Core trains experts with tensor parallelism only so")
        model.sequence_parallel = True


def _reach(arch: Architecture) -> int:
    """The longest window or original context length: what only a longer sequence exercises. 0: nothing."""
    lengths = [window for window in arch.windows if window]
    for rope in (arch.rope, arch.local_rope):
        if rope is not None and rope.scaling is not None:
            dynamic = rope.scaling["rope_type"] == "dynamic"
            original = rope.max_positions if dynamic else rope.scaling.get("original_max_position_embeddings")
            lengths.append(original or 0)
    return max(lengths, default=0)


def _seq_length(options: Options, arguments: BridgeArguments, arch: Architecture, cuda: bool, notes: list[str]) -> int:
    multiple = arguments.model.tensor_model_parallel_size if arguments.model.sequence_parallel else 1
    length, reach = options.seq_length, _reach(arch)
    if length is None and options.shrink:
        length = -(-SEQ_LENGTH // multiple) * multiple
    if length is None:
        affordable = LONGEST_LENGTH["cuda" if cuda else "cpu"]
        longer = -(-(reach + 1) // 64) * 64 + 64
        length = longer if reach and longer <= affordable else USUAL_LENGTH
        if arch.rope is None:
            length = min(length, arch.max_position_embeddings)
        length = max(1, length // multiple) * multiple
    if length % multiple:
        raise ConfigError(f"--seq_length {length} does not divide over {multiple} ranks of sequence parallelism")
    if arch.rope is None and length > arch.max_position_embeddings:
        raise ConfigError(f"--seq_length {length}: the model has {arch.max_position_embeddings} learned positions")
    if length <= reach:
        notes.append(
            f"{length} tokens stay inside the model's window or original context of {reach}: "
            f"give --seq_length {reach + 64}, or --shrink"
        )
    return length
