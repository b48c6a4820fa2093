"""Expert parallelism off CUDA: the number of tokens a rank sends to each other one, as a list of integers.

megatron.core turns these counts into numbers only where they lie on a GPU; gloo's all-to-all takes lists, not tensors.
"""

from __future__ import annotations

import functools

from primus_bridge.patching import Patch


def _apply() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def as_numbers(tensor, as_numpy=False, record_stream=False):
        moved = original(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.tolist() if as_numpy and hasattr(moved, "tolist") else moved

    token_dispatcher.maybe_move_tensor_to_cpu = as_numbers


PATCH = Patch(
    id="megatron-core-alltoall-splits",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="all-to-all split sizes stay tensors on a CPU, and gloo takes lists",
    remove_when="megatron.core hands lists of integers to all_to_all_single on every device",
    condition=lambda device: (device == "cpu", "gloo" if device == "cpu" else "NCCL and RCCL take what it gives"),
    apply=_apply,
    order=70,
)
