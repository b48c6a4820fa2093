"""Tensor-parallel linears, full or with adapters, as operations."""

from __future__ import annotations

from dataclasses import dataclass, field

from primus_bridge.peft.plan import AdapterSpec
from primus_bridge.plan.operations import FP32, MicroBatch, Operation


@dataclass
class Linears:
    """The linears of one layer."""

    batch: MicroBatch
    layer: int
    adapters: dict[str, list[AdapterSpec]] = field(init=False)

    def __post_init__(self):
        plan = self.batch.adapters
        prefix = f"decoder.layers.{self.layer}."
        self.adapters = {}
        for spec in plan.adapters if plan is not None else ():
            if spec.layer == self.layer:
                self.adapters.setdefault(spec.megatron.removeprefix(prefix), []).append(spec)

    def column(self, name: str, source: str, inputs: int, outputs: int, output: str) -> Operation:
        """Split by outputs: a rank has all positions of its ``outputs``, from the residual stream's own part."""
        batch = self.batch
        return self._linear(name, source, output, batch.stream_positions, inputs, batch.positions, outputs)

    def row(self, name: str, source: str, inputs: int, outputs: int) -> Operation:
        """Split by inputs: all positions of a rank's ``inputs``, summed into the stream's own part."""
        batch = self.batch
        return self._linear(name, source, name, batch.positions, inputs, batch.stream_positions, outputs)

    def replicated(self, name: str, source: str, inputs: int, outputs: int, output: str) -> Operation:
        """The whole weight on every rank, over the stream's own part."""
        positions = self.batch.stream_positions
        return self._linear(name, source, output, positions, inputs, positions, outputs)

    def _linear(
        self, name: str, source: str, output: str, in_positions: int, inputs: int, out_positions: int, outputs: int
    ) -> Operation:
        batch, element = self.batch, self.batch.element
        given, made = in_positions * inputs * element, out_positions * outputs * element
        # with sequence parallelism one side of a linear is gathered: all positions of it exist for a while
        gathered = batch.positions * element
        scratch = (gathered * inputs if out_positions > in_positions else 0) + (
            gathered * outputs if in_positions > out_positions else 0
        )
        specs = self.adapters.get(name)
        if batch.full:
            return Operation({source: given}, given, made, weight_gradient(batch, inputs * outputs), scratch)
        if specs is None:
            return Operation({}, given, made, scratch=scratch)
        keeps, width = self._adapter_keeps(name, source, output, specs, given, made, max(in_positions, out_positions))
        parameters = width * (inputs + outputs)
        # the adapters' gradient of the input comes beside the base's; DoRA's of the output beside that
        scratch += given + (2 * made if self._dora else 0)
        return Operation(keeps, given, made, weight_gradient(batch, parameters), scratch)

    @property
    def _dora(self) -> bool:
        return self.batch.adapters is not None and self.batch.adapters.use_dora

    def _adapter_keeps(
        self, name: str, source: str, output: str, specs: list[AdapterSpec], given: int, made: int, positions: int
    ) -> tuple[dict[str, float], int]:
        """(what LoRALinear keeps, the width of all its adapters side by side)"""
        batch, element = self.batch, self.batch.element
        width = sum(spec.rank for spec in specs)
        keeps: dict[str, float] = {}
        if batch.adapter_dropout:
            keeps[f"dropped {source} of {name}"] = given
            keeps[f"mask of {name}"] = given if batch.cpu else given // element
        else:
            keeps[source] = given
        keeps[f"low of {name}"] = positions * width * element
        if len(specs) > 1 or specs[0].part != "whole":
            inputs, outputs = (size // (positions * element) for size in (given, made))
            # several adapters work as one: their weights joined, padded to the rows of the base
            keeps[f"joined weights of {name}"] = width * (outputs + (inputs if len(specs) > 1 else 0)) * element
        if self._dora:
            keeps[f"bare {output}"] = made
        return keeps, width


def weight_gradient(batch: MicroBatch, numbers: int) -> int:
    """The gradient of a weight until it is added to the buffer: on a CPU a bf16 one is first converted to fp32."""
    converted = FP32 if batch.cpu and batch.element != FP32 else 0
    return numbers * (batch.element + converted)
