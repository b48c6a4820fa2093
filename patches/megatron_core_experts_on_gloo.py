"""Expert parallelism over gloo: ranks that exchange different numbers of tokens.

megatron.core turns the numbers of tokens from tensors into numbers only where they lie on a GPU, and gloo's all-to-all
takes no tensors. Where experts are split over ranks, it gathers and reduce-scatters parts of different sizes, and
gloo does both for equal sizes only.
"""

from __future__ import annotations

import functools

from primus_bridge.patching import Patch


def _apply() -> None:
    import torch
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    to_cpu = token_dispatcher.maybe_move_tensor_to_cpu
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    if hasattr(to_cpu, "__wrapped__"):
        return

    @functools.wraps(to_cpu)
    def as_numbers(tensor, as_numpy=False, record_stream=False):
        moved = to_cpu(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    @functools.wraps(gather)
    def gather_uneven(input_, group=None, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or len(set(output_split_sizes)) == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    @functools.wraps(reduce_scatter)
    def reduce_scatter_uneven(input_, group=None, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or len(set(input_split_sizes)) == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(list(input_split_sizes))[group.rank()].clone()

    token_dispatcher.maybe_move_tensor_to_cpu = as_numbers
    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


PATCH = Patch(
    id="megatron-core-experts-on-gloo",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="gloo exchanges parts of equal size only, and takes no tensors as sizes",
    remove_when="megatron.core hands plain numbers to its collectives, and gloo gathers parts of different sizes",
    condition=lambda device: (device == "cpu", "gloo" if device == "cpu" else "NCCL and RCCL do what it asks"),
    apply=_apply,
    order=70,
)
