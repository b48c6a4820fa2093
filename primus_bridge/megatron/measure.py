"""What is measured around the steps of a run: memory by phase, and the trace of --profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.megatron.memory import MemoryWatch
from primus_bridge.megatron.profile import StepProfiler
from primus_bridge.megatron.step import Batch


class Measurements:
    """Of one rank; start_step: the steps before."""

    def __init__(self, arguments: BridgeArguments, rank: int, start_step: int, chunks: list, optimizer: Any):
        self.memory = MemoryWatch(chunks, optimizer)
        self.profiler = StepProfiler(arguments, rank, start_step, chunks, optimizer)

    @contextmanager
    def step(self, step: int, batch: list[Batch]) -> Iterator[None]:
        """Around the passes and the update of ``step``, the first of a run being 1."""
        self.profiler.begin_step(step)
        measured = not self.profiler.running  # two cannot listen at a time
        if measured:
            self.memory.begin_step(batch)
        try:
            yield
        finally:
            self.profiler.end_step()
            if measured:
                self.memory.end_step()
