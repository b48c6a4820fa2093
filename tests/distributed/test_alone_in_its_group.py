"""The patch megatron_core_alone_in_its_group: the collectives stay what they are wherever there is somebody to meet."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_distributed


def in_place(ranks_of_group: int) -> tuple[list[float], list[float], int]:
    """(a reduced shard, gathered values, real collectives) of a buffer of rank + 1."""
    import torch
    import torch.distributed as dist

    from primus_bridge.config.arguments import DistArguments
    from primus_bridge.megatron.parallel import initialize_distributed

    initialize_distributed(DistArguments())
    from megatron.core.distributed import param_and_grad_buffer as buffers

    rank, calls = dist.get_rank(), []
    groups = [dist.new_group([0]), dist.new_group([1])] if ranks_of_group == 1 else [dist.group.WORLD] * 2
    place = rank if ranks_of_group == 2 else 0
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        real = getattr(buffers, name).collective
        counted = lambda *a, real=real, **k: calls.append(1) or real(*a, **k)  # noqa: E731
        from primus_bridge.patches.megatron_core_alone_in_its_group import _unless_alone

        setattr(buffers, name, _unless_alone(counted))
    gradients = torch.full((4,), rank + 1.0)
    shard = gradients.chunk(ranks_of_group)[place]
    buffers.dist_reduce_scatter_func(shard, gradients, op=dist.ReduceOp.SUM, group=groups[rank])
    parameters = torch.full((4,), rank + 1.0)
    own = parameters.chunk(ranks_of_group)[place]
    buffers.dist_all_gather_func(parameters, own, group=groups[rank])
    return shard.tolist(), parameters.tolist(), len(calls)


@pytest.mark.parametrize(
    ("ranks_of_group", "expected"),
    [
        (1, [([1.0] * 4, [1.0] * 4, 0), ([2.0] * 4, [2.0] * 4, 0)]),
        (2, [([3.0] * 2, [1.0, 1.0, 2.0, 2.0], 2), ([3.0] * 2, [1.0, 1.0, 2.0, 2.0], 2)]),
    ],
)
def test_left_out_only_where_a_rank_is_alone(ranks_of_group, expected):
    assert run_distributed(in_place, 2, ranks_of_group) == expected
