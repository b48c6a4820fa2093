"""The distributed optimizer's state in the shapes of the model's parameters: each rank its own slices, in place.

Megatron's "fully_reshardable" format: a tensor ``optimizer.state.{param,exp_avg,exp_avg_sq}.NAME`` for each parameter,
readable at any layout. Megatron itself gathers the whole state on every data-parallel rank to write it, and has each
read all of it. But a rank holds flat ranges of parameters, and a flat range of a tensor is a few rectangles of it,
which torch_dist writes from and reads into the optimizer's own tensors: no communication, no copy.
"""

from __future__ import annotations

import math
from typing import Any, Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from primus_bridge.megatron.optimizer import parts

TENSORS = ("param", "exp_avg", "exp_avg_sq")
"""Of each parameter; ``param`` is the optimizer's own copy in fp32, or the parameter itself where that is fp32."""


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the rectangles that elements start..stop-1 of a row-major tensor are, in their order.

    At most two for each dimension but the last, and one more: part of a row, whole rows, part of a row.
    """
    width = math.prod(shape[1:])
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:
            end = min(stop, (row + 1) * width)
            for offsets, sizes in rectangles(shape[1:], column, column + end - start):
                yield (row, *offsets), (1, *sizes)
        else:
            rows = (stop - start) // width
            end = start + rows * width
            yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
        start = end


def optimizer_shards(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any], *, loading: bool = False
) -> tuple[dict[Any, Any], dict[str, ShardedTensor]]:
    """(what ``optimizer.load_state_dict`` takes, this rank's rectangles of the tensors by key and place).

    model_state: the model's sharded state, on the parameters themselves. metadata: as for ``sharded_state_dict``.
    The rectangles are views of the optimizer's tensors: what is loaded into them is where it belongs. An optimizer that
    is not distributed has no rectangles: its tensors are in the first of the two, as Megatron makes them.
    """
    own = parts(optimizer)
    if len(own) > 1:  # dense parameters and experts
        optimizer._synchronize_steps()
    states: list[dict[Any, Any]] = []
    shards: list[ShardedTensor] = []
    for part in own:
        if isinstance(part, DistributedOptimizer):
            states.append(part.state_dict() | {"param_state_sharding_type": "fully_reshardable"})
            if loading:
                part.load_state_dict(part.state_dict())  # allocates the tensors to read into
            shards += _slices(part, model_state)
        else:
            states.append(part.sharded_state_dict(model_state, is_loading=loading, metadata=metadata))
    state = states[0] if len(states) == 1 else dict(enumerate(states))
    # not a list: Megatron merges what is left of it in common.pt, on a rank without any, with that of other ranks
    return state, {f"{shard.key}@{shard.global_offset}": shard for shard in shards}


def steps_taken(state: dict[Any, Any]) -> int:
    """How often the optimizer of this state has stepped, as far as this rank's parameter groups know."""
    own = [state, *(part for key, part in state.items() if isinstance(key, int))]
    groups = [group for part in own for group in part.get("optimizer", {}).get("param_groups", [])]
    return max((int(group.get("step", 0)) for group in groups), default=0)


def _slices(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """This rank's rectangles of every tensor of the state."""
    entries = {id(entry.data): entry for entry in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    buckets = [bucket for ranges in optimizer.gbuf_ranges for of_dtype in ranges.values() for bucket in of_dtype]
    for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        held, entry = ranges["param"], entries[id(parameter)]
        # the first linear of a gated MLP is two tensors of the checkpoint, views of the parameter
        pieces = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        for piece in pieces:
            assert piece.data.is_contiguous(), piece
            first = piece.data.storage_offset() - parameter.storage_offset()
            start, stop = max(held.start, first), min(held.end, first + piece.data.numel())
            # the last number counts data-parallel copies, and each of those ranks holds other slices
            replica = (*piece.replica_id[:-1], optimizer.distributed_optimizer_instance_id)
            for offsets, sizes in rectangles(piece.local_shape, start - first, stop - first):
                here = start - held.start
                start += math.prod(sizes)
                for name in TENSORS:
                    data = tensors[name].detach()[here : start - held.start]
                    yield _rectangle(f"optimizer.state.{name}.{piece.key}", data, piece, offsets, sizes, replica)


def _rectangle(
    key: str,
    data: torch.Tensor,
    piece: ShardedTensor,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    replica: tuple[int, ...],
) -> ShardedTensor:
    """``data``, flat, as the rectangle at ``offsets`` of this rank's ``piece`` of a parameter."""
    layers = piece.prepend_axis_num
    shape = (*(1 for _ in range(layers)), *sizes)
    place = (*(0 for _ in range(layers)), *offsets)
    return ShardedTensor(
        key,
        data.view(shape),
        data.dtype,
        shape,
        piece.global_shape,
        tuple(whole + own for whole, own in zip(piece.global_offset, place, strict=True)),
        axis_fragmentations=None,  # no grid: ranks hold rectangles of any size
        replica_id=replica,
        allow_shape_mismatch=piece.allow_shape_mismatch,
    )
