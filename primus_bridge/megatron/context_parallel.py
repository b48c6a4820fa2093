"""Context parallelism: which positions of a sequence a rank holds, and the whole sequence's keys from every rank.

A sequence of S positions is cut into 2 x ranks chunks, and rank r holds chunks r and 2 x ranks - 1 - r: a causal
query's work grows with its position, so an early chunk and a late one make ranks equal. Keys and values are gathered
whole, as in Llama 3's training. Source: Grattafiori et al. 2024, section 3.3.2.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def own_chunks(length: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """(start, stop) of the pieces of a sequence of ``length`` positions that the rank holds, in their order there."""
    if ranks == 1:
        return [(0, length)]
    assert length % (2 * ranks) == 0, (length, ranks)
    size = length // (2 * ranks)
    return [(chunk * size, (chunk + 1) * size) for chunk in (rank, 2 * ranks - 1 - rank)]


def own_part(x: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    """The rank's pieces of x, whose dimension ``dim`` is the whole sequence."""
    if ranks == 1:
        return x
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in own_chunks(x.shape[dim], rank, ranks)], dim)


def _sequence_order(ranks: int, device: torch.device) -> torch.Tensor:
    """Where each chunk of the sequence lies among the ranks' chunks, two a rank, one rank after the other."""
    order = [2 * chunk if chunk < ranks else 2 * (2 * ranks - 1 - chunk) + 1 for chunk in range(2 * ranks)]
    return torch.tensor(order, device=device)


class _WholeSequence(torch.autograd.Function):
    """Every rank uses all of it, so the gradients of a rank's own part come from all of them."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ranks = group, group.size()
        parts = x.new_empty(2 * ranks, x.shape[0] // 2, *x.shape[1:])
        dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group)
        return parts.index_select(0, _sequence_order(ranks, x.device)).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        ranks = ctx.group.size()
        parts = grad.unflatten(0, (2 * ranks, -1))
        parts = parts.new_empty(parts.shape).index_copy_(0, _sequence_order(ranks, grad.device), parts)
        own = grad.new_empty(grad.shape[0] // ranks, *grad.shape[1:])
        dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=ctx.group)
        return own, None


def whole_sequence(x: torch.Tensor, group) -> torch.Tensor:
    """x [s / ranks, ...], this rank's pieces -> [s, ...] in the sequence's order; its gradient is summed over ranks."""
    return _WholeSequence.apply(x, group)
