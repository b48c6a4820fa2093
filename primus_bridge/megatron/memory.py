"""Where a rank's memory goes: weights, gradients, optimizer, activations, buffers, measured while it trains."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy

from primus_bridge.megatron.optimizer import parts
from primus_bridge.megatron.parallel import device, peak_memory_bytes
from primus_bridge.megatron.phases import STEP, Phases, listen
from primus_bridge.megatron.step import Batch


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes on a rank's device.

    weights, gradients, optimizer: the storages of parameters, of gradient buffers, and of Adam's states with the master
    weights. activations: the most that a step's forward and backward passes held beside them so far; None before one
    was measured. buffers: the rest between two steps: on a GPU what else its allocator gave, on a CPU the model's
    buffers and Megatron's for communication. host: of the optimizer's states, what offloading moved to the host.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: Optional[int]
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the device: at the largest moment of a step."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0) + self.buffers

    def metrics(self) -> dict[str, int]:
        """As a log line has them: ``memory_weights`` and so on; what is not known is left out."""
        named = {f"memory_{name}": getattr(self, name) for name in NAMES}
        return {name: value for name, value in named.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


NAMES = ("weights", "gradients", "optimizer", "activations", "buffers")


class MemoryWatch:
    """Measures a rank's memory around its steps: ``begin_step`` before each, ``end_step`` after, when it failed too.

    A GPU's allocator counts by itself, so every step is measured. A CPU's has to be listened to, which costs about a
    third of a step: it is done for the first one, and again for each with a larger micro-batch than all before.
    """

    def __init__(self, chunks: list, optimizer: Any):
        self._chunks, self._optimizer = chunks, optimizer
        self._gpu = device().type == "cuda"
        self._activations: Optional[int] = None
        self._held: Optional[tuple[int, int, int, int]] = None
        self._before = self._peak = 0
        self._positions = 0
        self._listening = self._collects = False
        self._stepped = False
        self.longest = 0
        """Of the sequences of the micro-batches so far, padding included."""

    def begin_step(self, batch: list[Batch]) -> None:
        """batch: the micro-batches that this rank's step is about to take."""
        self.longest = max(self.longest, *(micro["tokens"].shape[-1] for micro in batch))
        positions = max(micro["tokens"].numel() for micro in batch)
        # while torch's profiler runs, no other can
        if self._gpu or (positions > self._positions and not torch.autograd._profiler_enabled()):
            self._positions = max(positions, self._positions)
            listen(self._chunks, self._optimizer, Phases(self._began, self._ended))

    def end_step(self) -> None:
        listen(self._chunks, self._optimizer, None)
        if self._listening:  # the step failed on its way
            self._stop()

    def _began(self, name: str) -> None:
        if name != STEP:
            return
        if self._gpu:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            # what was allocated before and is collected meanwhile, the profiler would warn of
            self._collects = gc.isenabled()
            gc.disable()
            config = _ExperimentalConfig()
            _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, config))
            self._listening = True

    def _ended(self, name: str) -> None:
        if name != STEP:
            return
        rose = torch.cuda.max_memory_allocated() - self._before if self._gpu else _rise(self._stop())
        self._activations = max(self._activations or 0, rose)

    def _stop(self) -> list[list[Any]]:
        """The events of each thread since the step's passes began."""
        self._listening = False
        if self._collects:
            gc.enable()
        return _disable_profiler_legacy()

    def phases(self) -> PhaseMemory:
        """As of the last step."""
        if self._held is None or not self._stepped:
            self._stepped = any(each.optimizer is not None and each.optimizer.state for each in parts(self._optimizer))
            self._held = held(self._chunks, self._optimizer)
        weights, gradients, optimizer, host = self._held
        if self._gpu:
            buffers = max(self._before - weights - gradients - optimizer, 0)
        else:
            buffers = _size(_buffers(self._chunks), set(), device())
        return PhaseMemory(weights, gradients, optimizer, self._activations, buffers, host)

    def peak(self) -> int:
        """The most that the process took so far: device memory on a GPU, resident memory on a CPU."""
        return max(self._peak, peak_memory_bytes())


def held(chunks: list, optimizer: Any) -> tuple[int, int, int, int]:
    """Bytes of (weights, gradients, the optimizer's states, those of them in host memory beside a GPU)."""
    here, seen = device(), set[int]()
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = _size(chain(parameters, (buffer.param_data for buffer in buffers)), seen, here)
    gradients = _size(chain((buffer.grad_data for buffer in buffers), (each.grad for each in parameters)), seen, here)
    states = list(_states(optimizer))
    host = 0 if here.type == "cpu" else _size(states, set(seen), torch.device("cpu"))
    return weights, gradients, _size(states, seen, here), host


def _states(optimizer: Any) -> Iterator[Any]:
    """Adam's states and the parameters that it updates."""
    for each in parts(optimizer):
        if each.optimizer is None:  # this rank trains nothing of that kind
            continue
        for group in each.optimizer.param_groups:
            yield from group["params"]
        for state in each.optimizer.state.values():
            yield from state.values()


def _buffers(chunks: list) -> Iterator[Any]:
    for chunk in chunks:
        yield from chunk.module.buffers()
    yield from parallel_state.get_global_memory_buffer().buffer.values()


def _size(tensors: Iterable[Any], seen: set[int], where: torch.device) -> int:
    """Bytes of the storages there that are not among ``seen``, and are afterwards."""
    total = 0
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != where.type:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _rise(threads: list[list[Any]]) -> int:
    """The most that was allocated at a time and not yet freed, by the events of torch's profiler."""
    now = most = 0
    for event in chain.from_iterable(threads):
        if event.kind() == "memory_alloc":
            now += event.cpu_memory_usage()
            most = max(most, now)
    return most
