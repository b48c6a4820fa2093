"""The smallest changes that make a run fit its memory, found by planning each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.validate import check_world, validate_shape
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.errors import ConfigError
from primus_bridge.peft.plan import adapter_plan
from primus_bridge.plan.device import Device
from primus_bridge.plan.layout import Layout
from primus_bridge.plan.memory import stage_memory

WANTED = 3
TRIED = 400
"""Combinations at most: each is planned in milliseconds."""
LARGEST_TENSOR = 8
"""Tensor parallelism wants the fast links inside of a node."""


class Change(NamedTuple):
    """flags: argument -> value; cost: how much of a change it is, in speed and in what is trained."""

    flags: dict[str, Any]
    cost: float
    ranks: int = 1
    """By how much the number of ranks is multiplied."""


NOTHING = Change({}, 0.0)


@dataclass(frozen=True)
class Suggestion:
    """flags: to paste behind the command; total: bytes of a rank with them; world_size: ranks with them."""

    flags: str
    total: int
    world_size: int


def suggest(
    arguments: BridgeArguments,
    model: HFModel,
    adapter: Optional[dict[str, Any]],
    world_size: int,
    device: Device,
    length: Optional[int],
) -> list[Suggestion]:
    """Up to WANTED changes that fit, the smallest first, none of which holds what another changes."""
    found: list[tuple[set[str], Suggestion]] = []
    for combination in itertools.islice(_combinations(arguments, model, device), TRIED):
        flags = {name: value for change in combination for name, value in change.flags.items()}
        ranks = world_size
        for change in combination:
            ranks *= change.ranks
        # what a suggestion does already is not said again with more beside it, or stronger
        what = {*flags, *(["ranks"] if ranks != world_size else [])}
        # one at least, if there is one, without more ranks: there may be no more
        more_ranks = sum("ranks" in before for before, _ in found)
        if any(before <= what for before, _ in found) or ("ranks" in what and more_ranks == WANTED - 1):
            continue
        total = _total(arguments, flags, model, adapter, ranks, device, length)
        if total is not None and total <= device.usable:
            found.append((what, Suggestion(_as_flags(flags, ranks, world_size), total, ranks)))
            if len(found) == WANTED:
                break
    return [suggestion for _, suggestion in found]


def _total(
    arguments: BridgeArguments,
    flags: dict[str, Any],
    model: HFModel,
    adapter: Optional[dict[str, Any]],
    ranks: int,
    device: Device,
    length: Optional[int],
) -> Optional[int]:
    """Bytes of the largest stage's ranks; None: such a run cannot be."""
    from primus_bridge.preflight import fit_to_model

    changed = copy.deepcopy(arguments)
    for name, value in flags.items():
        schema.put(changed, name, value, "suggested")
    try:
        validate_shape(changed)
        fit_to_model(changed, model.architecture)
        check_world(changed, ranks)
        adapters = adapter_plan(changed.peft, model, adapter) if changed.peft.scheme is not None else None
    except ConfigError:
        return None
    layout = Layout.of(changed, model.architecture, ranks)
    cpu = device.kind == "cpu"
    stages = stage_memory(changed, model.family, model.architecture, layout, adapters, cpu, length)
    return max(stage.total for stage in stages)


def _combinations(arguments: BridgeArguments, model: HFModel, device: Device) -> Iterator[tuple[Change, ...]]:
    """One change of each kind, or none of it; the cheapest together first."""
    every = itertools.product(*([NOTHING, *kind] for kind in _kinds(arguments, model, device)))
    costs = sorted(every, key=lambda combination: sum(change.cost for change in combination))
    return iter(costs[1:])  # the first changes nothing


def _kinds(arguments: BridgeArguments, model: HFModel, device: Device) -> list[list[Change]]:
    """What may be changed, a list of stronger and stronger changes a kind."""
    layout, train, arch = arguments.model, arguments.train, model.architecture
    kinds: list[list[Change]] = []
    if not arguments.ddp.use_distributed_optimizer:
        kinds.append([Change({"ddp.use_distributed_optimizer": True}, 0.1)])
    if train.micro_batch_size > 1:
        halves = [train.micro_batch_size // 2, 1] if train.micro_batch_size > 3 else [1]
        kinds.append([Change({"train.micro_batch_size": size}, 0.4 + 0.1 * at) for at, size in enumerate(halves)])
    if layout.recompute_granularity != "full":
        kinds.append([Change({"model.recompute_granularity": "full"}, 1.0)])
    if arguments.mixed_precision == "fp32":
        kinds.append([Change({"mixed_precision": "bf16_mixed"}, 0.8)])
    if arguments.mixed_precision == "bf16_mixed" and device.kind != "cpu":
        if arguments.ddp.use_distributed_optimizer and not arguments.optimizer.optimizer_cpu_offload:
            kinds.append([Change({"optimizer.optimizer_cpu_offload": True}, 2.0)])
    tensor = layout.tensor_model_parallel_size
    split = [size for size in (2, 4, 8) if tensor < size <= LARGEST_TENSOR]
    kinds.append(
        [
            Change({"model.tensor_model_parallel_size": size, "model.sequence_parallel": True}, 0.9 * (at + 1))
            for at, size in enumerate(split)
        ]
    )
    if tensor > 1 and not layout.sequence_parallel:
        kinds[-1].insert(0, Change({"model.sequence_parallel": True}, 0.2))
    if layout.virtual_pipeline_model_parallel_size is None and not (
        layout.num_layers_in_first_pipeline_stage or layout.num_layers_in_last_pipeline_stage
    ):
        stages = [layout.pipeline_model_parallel_size * factor for factor in (2, 4, 8)]
        kinds.append(
            [Change({"model.pipeline_model_parallel_size": size}, 1.4 * (at + 1)) for at, size in enumerate(stages)]
        )
    if arch.moe is not None:
        sizes = [layout.expert_model_parallel_size * factor for factor in (2, 4, 8)]
        kinds.append(
            [Change({"model.expert_model_parallel_size": size}, 0.7 * (at + 1)) for at, size in enumerate(sizes)]
        )
    if arguments.peft.scheme is None:
        kinds.append([Change({"peft.scheme": "lora"}, 4.0)])
    if device.kind != "cpu":  # there more ranks share the same memory
        kinds.append([Change({}, 2.5 * (at + 1), ranks=factor) for at, factor in enumerate((2, 4, 8, 16))])
    return kinds


FLAGS = {"mixed_precision": "precision"}


def _as_flags(flags: dict[str, Any], ranks: int, before: int) -> str:
    words = []
    for name, value in flags.items():
        if name == "peft.scheme":
            words.append("--use_lora")
            continue
        words.append("--" + FLAGS.get(name, name.rpartition(".")[2]))
        if value is not True:
            words.append(str(value))
    if ranks != before:
        words.append(f"--nproc {ranks}")  # the name that primus train has too
    return " ".join(words)
