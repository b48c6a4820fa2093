"""A run's plan as a value: what it would do, from its arguments and the model's config.json."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

from primus_bridge.config import describe
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.validate import check_world, validate_data, validate_shape
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.errors import ConfigError
from primus_bridge.peft.plan import AdapterPlan, adapter_plan
from primus_bridge.plan.device import Device
from primus_bridge.plan.layout import Layout
from primus_bridge.plan.memory import StageMemory, stage_memory
from primus_bridge.plan.parameters import whole_model
from primus_bridge.plan.schedule import bubble, stage_work
from primus_bridge.plan.split import Split, better_split
from primus_bridge.plan.steps import Data, Forward, Steps, count_steps
from primus_bridge.plan.suggest import Suggestion, suggest


@dataclass(frozen=True)
class Plan:
    """parameters: of the whole model; trainable: of the whole run, adapters for LoRA; bubble: part of a step that
    stages wait; slowest: the slowest stage's work, as a multiple of the mean; split: one that waits clearly less."""

    arguments: BridgeArguments
    model: HFModel
    layout: Layout
    adapters: Optional[AdapterPlan]
    parameters: int
    active_parameters: int
    stages: list[StageMemory]
    bubble: float
    slowest: float
    split: Optional[Split]
    steps: Steps
    data: Optional[Data]
    device: Device
    suggestions: list[Suggestion]

    @property
    def peak(self) -> StageMemory:
        """The stage whose ranks need the most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.device.usable

    def to_dict(self) -> dict[str, Any]:
        """Everything that the terminal shows, as plain JSON; memory in bytes."""
        layout, steps = self.layout, self.steps
        sizes = {name: value for name, value in vars(layout).items() if name != "chunks"}
        return {
            "model": {
                "name": self.model.name,
                "model_type": self.model.architecture.model_type,
                "layers": self.model.architecture.num_layers,
                "parameters": self.parameters,
                "active_parameters": self.active_parameters,
            },
            "layout": sizes,
            "stages": [
                {
                    **vars(stage),
                    "total": stage.total,
                    "chunks": [
                        {
                            "layers": list(chunk.layers),
                            "embedding": chunk.embedding,
                            "output": chunk.output,
                        }
                        for chunk in layout.of_stage(stage.stage)
                    ],
                }
                for stage in self.stages
            ],
            "bubble": self.bubble,
            "slowest": self.slowest,
            "better_split": vars(self.split) if self.split is not None else None,
            "steps": {**vars(steps), "tokens": steps.tokens},
            "data": vars(self.data) if self.data is not None else None,
            "device": vars(self.device),
            "fits": self.fits,
            "suggestions": [
                {"flags": suggestion.flags, "total": suggestion.total, "world_size": suggestion.world_size}
                for suggestion in self.suggestions
            ],
            "arguments": {name: {"value": value, "source": source} for name, value, source in describe(self.arguments)},
            "notes": self.arguments.notes,
        }


def open_model(arguments: BridgeArguments) -> tuple[HFModel, Optional[dict[str, Any]]]:
    """(the model, the record of an adapter that the run goes on with); no weights are read or fetched.

    Raises ConfigError when there is none, and fills in what follows from it, as a run does.
    """
    from primus_bridge.checkpoint.start import starting_point
    from primus_bridge.conversion.hf_folder import check_unquantised
    from primus_bridge.preflight import fit_to_model

    checkpoint = arguments.checkpoint
    if not (checkpoint.hf_model_name_or_path or checkpoint.load or checkpoint.pretrained_checkpoint):
        raise ConfigError(
            "no model: give hf_model_name_or_path, a folder with a config.json or a hub id, or --load, a checkpoint"
        )
    start = starting_point(arguments, fetch_weights=False)
    # a plan needs no convert_from_hf, without which a fine-tuning has its weights from there all the same
    from_checkpoint = start.resume is not None or start.weights is not None
    if start.hf_weights or (arguments.stage == "sft" and not from_checkpoint):
        check_unquantised(start.model.folder)
    fit_to_model(arguments, start.model.architecture)
    return start.model, start.adapter


def make_plan(arguments: BridgeArguments, world_size: int, device: Device, count_data: bool = False) -> Plan:
    """The plan of a run on so many ranks. count_data: read and tokenise the data set, through the run's cache.

    Raises ConfigError for what would stop the run because of its arguments, its layout or its model.
    """
    if arguments.engine != "core":
        raise ConfigError(
            f"engine {arguments.engine} takes other memory than is counted here, with kernels and buffers of its own: "
            "plan with --engine core; primus train --dry_run checks the run as it is",
            where=arguments.sources.get("engine"),
        )
    validate_shape(arguments)
    if count_data:
        validate_data(arguments)
    model, adapter = open_model(arguments)
    check_world(arguments, world_size)
    family, arch = model.family, model.architecture
    adapters = adapter_plan(arguments.peft, model, adapter) if arguments.peft.scheme is not None else None
    data = None
    if count_data:
        from primus_bridge.plan.data import read_data

        data = read_data(arguments, model)
    layout = Layout.of(arguments, arch, world_size)
    length = padded_length(arguments, data)
    cpu = device.kind == "cpu"
    stages = stage_memory(arguments, family, arch, layout, adapters, cpu, length)
    too_much = max(stage.total for stage in stages) > device.usable
    tokens = data.tokens / data.sequences if data is not None else arguments.model.seq_length
    forward = Forward.of(family, arch, tokens)
    steps = count_steps(arguments, layout, data, forward, tokens)
    work = [[forward.work(arguments, chunk) for chunk in layout.of_stage(stage)] for stage in range(layout.pipeline)]
    waiting = bubble(layout, work, steps.micro_batches)
    of_stages = list(map(stage_work, work))
    return Plan(
        arguments=arguments,
        model=model,
        layout=layout,
        adapters=adapters,
        parameters=whole_model(family, arch),
        active_parameters=whole_model(family, arch, active_only=True),
        stages=stages,
        bubble=waiting,
        slowest=max(of_stages) * layout.pipeline / sum(of_stages),
        split=better_split(
            layout, arch.num_layers, arguments.model, partial(forward.work, arguments), steps.micro_batches, waiting
        ),
        steps=steps,
        data=data,
        device=device,
        suggestions=suggest(arguments, model, adapter, world_size, device, length) if too_much else [],
    )


def padded_length(arguments: BridgeArguments, data: Optional[Data]) -> Optional[int]:
    """The longest sequence of a micro-batch, where the data was counted and decides it; else None: seq_length."""
    from primus_bridge.config.validate import sequence_multiple

    if data is None or arguments.dataset.pad_to == "seq_length" or arguments.dataset.packed_sequence:
        return None
    multiple = sequence_multiple(arguments.model)
    return -(-data.longest // multiple) * multiple


def planned_stages(
    arguments: BridgeArguments,
    model: HFModel,
    adapter: Optional[dict[str, Any]],
    world_size: int,
    cpu: bool,
    length: Optional[int] = None,
) -> list[StageMemory]:
    """The memory of a run's stages alone. arguments: checked ones; length: see stage_memory. Costs milliseconds."""
    arch = model.architecture
    adapters = adapter_plan(arguments.peft, model, adapter) if arguments.peft.scheme is not None else None
    layout = Layout.of(arguments, arch, world_size)
    return stage_memory(arguments, model.family, arch, layout, adapters, cpu, length)


def memory_warning(
    arguments: BridgeArguments, model: HFModel, adapter: Optional[dict[str, Any]], world_size: int, device: Device
) -> Optional[str]:
    """A note for a run whose ranks would need more memory than they have; None: it fits.

    arguments: checked ones. Costs milliseconds.
    """
    stages = planned_stages(arguments, model, adapter, world_size, device.kind == "cpu")
    peak = max(stages, key=lambda stage: stage.total)
    if peak.total <= device.usable:
        return None
    return (
        f"a rank may need {peak.total / 1e9:.1f} GB for sequences of seq_length {arguments.model.seq_length}, and "
        f"{device.usable / 1e9:.1f} of {device.total / 1e9:.1f} GB are usable: `primus plan` says what to change"
    )
