"""The torch.cuda functions that megatron.core calls, answered for the CPU: streams, events, RNG state, device."""

from __future__ import annotations

import contextlib

from primus_bridge.patching import Patch


def _apply() -> None:
    import torch

    if getattr(torch.cuda, "_primus_bridge_cpu", False):
        return

    class Stream:
        """Work on a CPU is done when the call returns, so there is nothing to wait for."""

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def synchronize(self):
            pass

        def wait_stream(self, other):
            pass

        def wait_event(self, event):
            pass

        def wait(self, stream=None):
            pass

        def record(self, stream=None):
            pass

        def record_event(self, event=None):
            return Stream()

        def query(self):
            return True

    cpu = torch.device("cpu")
    cuda = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.Stream = cuda.Event = Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.nvtx.range_push = lambda message: None
    cuda.nvtx.range_pop = lambda: None
    cuda.nvtx.range = lambda message, *args, **kwargs: contextlib.nullcontext()
    cuda._primus_bridge_cpu = True

    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


PATCH = Patch(
    id="torch-cuda-calls-on-cpu",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="megatron.core calls torch.cuda for streams, events, RNG state and the current device",
    remove_when="megatron.core asks torch.accelerator, or its device setting, instead",
    condition=lambda device: (device == "cpu", "no CUDA or ROCm device" if device == "cpu" else "there is a GPU"),
    apply=_apply,
    order=20,
)
