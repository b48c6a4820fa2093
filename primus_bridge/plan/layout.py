"""The layout of a run: how many ranks share what, and which layers lie on which pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from primus_bridge.config.arguments import BridgeArguments, ModelArguments
from primus_bridge.conversion.architecture import Architecture


@dataclass(frozen=True)
class Chunk:
    """The part of the model that a rank of one pipeline stage runs at a time; layers count from 0."""

    stage: int
    number: int
    """Among the stage's chunks; 0 unless the schedule is interleaved."""
    layers: range
    embedding: bool
    output: bool


@dataclass(frozen=True)
class Layout:
    """Sizes of every kind of parallelism, and the chunks in the order of the stages, then of the model."""

    world_size: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    data: int
    expert: int
    expert_tensor: int
    expert_data: int
    sequence_parallel: bool
    chunks: tuple[Chunk, ...]

    @classmethod
    def of(cls, arguments: BridgeArguments, arch: Architecture, world_size: int) -> Layout:
        """Of arguments that ``check_layout`` and ``check_world`` have passed."""
        model = arguments.model
        tensor, pipeline, context = (
            model.tensor_model_parallel_size,
            model.pipeline_model_parallel_size,
            model.context_parallel_size,
        )
        expert = model.expert_model_parallel_size
        expert_tensor = model.expert_tensor_parallel_size or tensor
        return cls(
            world_size=world_size,
            tensor=tensor,
            pipeline=pipeline,
            virtual=model.virtual_pipeline_model_parallel_size or 1,
            context=context,
            data=world_size // (tensor * pipeline * context),
            expert=expert,
            expert_tensor=expert_tensor,
            expert_data=world_size // (expert * expert_tensor * pipeline),
            sequence_parallel=model.sequence_parallel,
            chunks=deal_layers(arch.num_layers, model),
        )

    def of_stage(self, stage: int) -> tuple[Chunk, ...]:
        return tuple(chunk for chunk in self.chunks if chunk.stage == stage)

    def describe(self) -> str:
        """tensor 4 x pipeline 2 x data 2 = 16 ranks, sequence parallel"""
        sizes = [("tensor", self.tensor), ("pipeline", self.pipeline), ("context", self.context), ("data", self.data)]
        text = " x ".join(f"{name} {size}" for name, size in sizes if size > 1 or name != "context")
        text += f" = {self.world_size} rank{'' if self.world_size == 1 else 's'}"
        if self.expert > 1:
            text += f", expert {self.expert} x tensor {self.expert_tensor}"
        if self.sequence_parallel:
            text += ", sequence parallel"
        return text + (f", {self.virtual} virtual stages" if self.virtual > 1 else "")


def deal_layers(num_layers: int, model: ModelArguments) -> tuple[Chunk, ...]:
    """As megatron.core deals them: in turn over the stages, ``virtual`` times; uneven at the ends where asked so."""
    stages, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    middle = stages * virtual - (first is not None) - (last is not None)
    share = (num_layers - (first or 0) - (last or 0)) // max(middle, 1)
    sizes = [share] * (stages * virtual)
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    chunks, start = [], 0
    for place, size in enumerate(sizes):
        number, stage = divmod(place, stages)
        layers = range(start, start + size)
        chunks.append(Chunk(stage, number, layers, embedding=place == 0, output=place == len(sizes) - 1))
        start += size
    return tuple(sorted(chunks, key=lambda chunk: (chunk.stage, chunk.number)))
