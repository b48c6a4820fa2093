"""Causal attention by torch's fused kernels: documents, windows, soft caps, and keys of other context-parallel ranks.

Queries are cut into blocks that each see one run of keys; no whole mask is ever made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.megatron.context_parallel import own_chunks, whole_sequence
from primus_bridge.megatron.documents import Documents
from primus_bridge.megatron.rng import own_numbers
from primus_bridge.megatron.turbo import FlashAttention


def _varlen_attention():
    """torch's flash attention over documents of one row, where this torch has it with groups and windows; else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= set(options) else None


VARLEN = _varlen_attention()
# queries at a time where a mask or the scores have to be made
QUERY_BLOCK = 1024
# keys up to which a CPU is faster in fp32: torch's bf16 backward pass takes 2.5 times as long at 100, the same at 300
FP32_KEYS = 256


class Block(NamedTuple):
    """This rank's queries start..stop-1, and the run of keys of the whole sequence that they are the last of.

    Causal attention is then aligned at the lower right: the last query sees every key.
    """

    start: int
    stop: int
    first_key: int
    last_key: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.last_key - self.first_key


def document_blocks(pieces: Sequence[tuple[int, int]], bounds: Sequence[int]) -> Iterator[Block]:
    """A block for each document in each of this rank's pieces of the sequence.

    pieces: (start, stop) in the sequence, in the order in which this rank holds them. bounds: where documents begin,
    and where the last one ends.
    """
    held = 0
    for start, stop in pieces:
        for begin, end in pairwise(bounds):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield Block(held + first - start, held + last - start, begin, last)
        held += stop - start


def query_blocks(block: Block, size: int, window: Optional[int]) -> Iterator[Block]:
    """``size`` queries of a block at a time, each with the keys that its first query's window begins with."""
    offset = block.last_key - block.stop
    for start in range(block.start, block.stop, size):
        stop = min(start + size, block.stop)
        first = block.first_key if window is None else max(block.first_key, offset + start - window + 1)
        yield Block(start, stop, first, offset + stop)


class _Slices(torch.autograd.Function):
    """x[start:stop] for each range; one gradient for all of them, where autograd would make a whole one for each."""

    @staticmethod
    def forward(ctx, x, ranges):
        ctx.shape, ctx.ranges = x.shape, ranges
        return tuple(x[start:stop] for start, stop in ranges)

    @staticmethod
    def backward(ctx, *grads):
        if [0, *(stop for _, stop in ctx.ranges)] == [*(start for start, _ in ctx.ranges), ctx.shape[0]]:
            return torch.cat(grads), None  # one range follows the other, from end to end
        # where many blocks share a key, their gradients are summed in fp32
        whole = grads[0].new_zeros(ctx.shape, dtype=torch.float32)
        for (start, stop), grad in zip(ctx.ranges, grads, strict=True):
            whole[start:stop] += grad
        return whole.to(grads[0].dtype), None


_masks: dict[tuple, torch.Tensor] = {}


def lower_right_mask(queries: int, keys: int, window: Optional[int], like: torch.Tensor) -> torch.Tensor:
    """[queries, keys] of like's dtype, 0 where a query sees a key and -inf elsewhere; the last query sees the last key.

    A corner of the largest mask so far: what backward passes keep is one mask, not one for every block and layer.
    """
    kind = (window, like.dtype, like.device)
    mask = _masks.get(kind)
    if mask is None or mask.shape[0] < queries or mask.shape[1] < keys:
        rows, columns = (queries, keys) if mask is None else (max(queries, mask.shape[0]), max(keys, mask.shape[1]))
        distance = torch.arange(columns - rows, columns, device=like.device)[:, None] - torch.arange(
            columns, device=like.device
        )
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        _masks[kind] = mask = torch.zeros(rows, columns, dtype=like.dtype, device=like.device)
        mask.masked_fill_(~seen, -torch.inf)
    corner = mask[mask.shape[0] - queries :, mask.shape[1] - keys :]
    # kernels of GPUs want masks that begin at an aligned address
    return corner.contiguous() if like.is_cuda else corner


class SDPACoreAttention(torch.nn.Module):
    """Causal attention of this rank's queries; torch's fused kernels on GPU and CPU.

    query [s, b, heads, d], key [s, b, groups, d], value [s, b, groups, dv] -> [s, b, heads * dv]; under context
    parallelism (``cp_group``) s is this rank's part of the sequence. Documents of a packed row do not see each other.
    Right padding needs no mask: no real token can see a later, padded one.
    """

    def __init__(self, config, layer_number: int, arch: Architecture, cp_group=None):
        super().__init__()
        self.config = config
        self.scale = arch.softmax_scale or 1.0 / math.sqrt(arch.kv_channels)
        self.window = arch.window(layer_number - 1)
        self.softcap = arch.attention_softcap
        self.dropout = config.attention_dropout
        self.cp_group = cp_group if cp_group is not None and cp_group.size() > 1 else None
        self.flash: Optional[FlashAttention] = None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Optional[Documents] = None
    ) -> torch.Tensor:
        p = self.dropout if self.training else 0.0
        if p > 0:
            # heads are split over tensor-parallel ranks, so each rank draws from its own RNG state
            with own_numbers(self.config):
                return self._attend(query, key, value, documents, p).flatten(2)
        return self._attend(query, key, value, documents, p).flatten(2)

    def _attend(self, query, key, value, documents: Optional[Documents], p: float) -> torch.Tensor:
        s = query.shape[0]
        rank, ranks = (self.cp_group.rank(), self.cp_group.size()) if self.cp_group is not None else (0, 1)
        bounds = documents.bounds(s * ranks) if documents is not None else [0, s * ranks]
        if ranks > 1:
            sizes = (key.shape[-1], value.shape[-1])
            key, value = whole_sequence(torch.cat((key, value), dim=-1), self.cp_group).split(sizes, dim=-1)
        elif len(bounds) > 2 and self.flash is not None and self.flash.takes(query):
            return self.flash.documents(query, key, value, bounds, p)
        elif len(bounds) > 2 and self._takes_documents(query, p):
            return self._by_varlen(query, key, value, bounds)
        pieces = own_chunks(s * ranks, rank, ranks)
        blocks = [block for whole in document_blocks(pieces, bounds) for block in self._cut(whole, query)]
        if len(blocks) == 1 and ranks == 1:
            return self._block(query, key, value, p)
        queries = _Slices.apply(query, [(block.start, block.stop) for block in blocks])
        ranges = [(block.first_key, block.last_key) for block in blocks]
        parts = zip(queries, _Slices.apply(key, ranges), _Slices.apply(value, ranges), strict=True)
        if self.softcap is not None and sum(block.queries * block.keys for block in blocks) > QUERY_BLOCK**2:
            # the scores of a block are made again in the backward pass: only one block's are ever kept
            return torch.cat([checkpoint(self._block, *part, p, use_reentrant=False) for part in parts])
        return torch.cat([self._block(*part, p) for part in parts])

    def _cut(self, block: Block, query: torch.Tensor) -> Iterator[Block]:
        """A document's block as it is where a kernel needs no mask for it, else some of its queries at a time."""
        window = self.window if self.window is not None and self.window < block.keys else None
        if self.flash is not None and self.flash.takes(query):
            return iter((block,))
        if self.softcap is None and window is None and (query.is_cuda or block.queries == block.keys):
            return iter((block,))
        return query_blocks(block, max(window, 128) if window else QUERY_BLOCK, window)

    def _block(self, query, key, value, p: float) -> torch.Tensor:
        """A Block's [queries, b, heads, d], [keys, b, groups, d], [keys, b, groups, dv] -> [queries, b, heads, dv]."""
        if self.flash is not None and self.flash.takes(query):
            return self.flash.block(query, key, value, p)
        queries, keys = query.shape[0], key.shape[0]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if q.dtype is torch.bfloat16 and not q.is_cuda and keys <= FP32_KEYS and self.softcap is None:
            q, k, v = q.float(), k.float(), v.float()
        window = self.window if self.window is not None and self.window < keys else None
        if self.softcap is not None:
            out = self._capped(q, k, v, p, lower_right_mask(queries, keys, window, q))
        elif window is not None or (queries != keys and not q.is_cuda):
            out = self._fused(q, k, v, p, lower_right_mask(queries, keys, window, q))
        else:
            out = self._fused(q, k, v, p, causal_lower_right(queries, keys) if queries != keys else None)
        return out.permute(2, 0, 1, 3).to(query.dtype)

    def _fused(self, q, k, v, p: float, mask) -> torch.Tensor:
        grouped = k.shape[1] != q.shape[1]
        if grouped and q.is_cuda and (q.dtype == torch.float32 or mask is not None):
            # no fused fp32 or masked kernel on a GPU takes groups: it would fall back to one that stores s x s scores
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            grouped = False
        size = v.shape[-1]
        if size < q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - size))  # the fused kernels want one size for all three
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, dropout_p=p, enable_gqa=grouped
        )
        return out[..., :size]

    def _capped(self, q, k, v, p: float, mask: torch.Tensor) -> torch.Tensor:
        """Scores through cap * tanh(scores / cap). Source: Gemma 2, 2024."""
        assert self.softcap is not None
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.tanh(q @ k.transpose(2, 3) * (self.scale / self.softcap)) * self.softcap
        weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        return (F.dropout(weights, p) if p else weights) @ v

    def _takes_documents(self, query: torch.Tensor, p: float) -> bool:
        """Whether one kernel can take all documents at once: flash attention of variable lengths, on a GPU."""
        plain = self.window is None and self.softcap is None and p == 0
        return plain and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and VARLEN is not None

    def _by_varlen(self, query, key, value, bounds: Sequence[int]) -> torch.Tensor:
        assert VARLEN is not None
        size = value.shape[-1]
        if size < query.shape[-1]:
            value = F.pad(value, (0, query.shape[-1] - size))
        starts = torch.tensor(bounds, dtype=torch.int32).to(query.device, non_blocking=True)
        longest = max(stop - start for start, stop in pairwise(bounds))
        q, k, v = (t.squeeze(1) for t in (query, key, value))  # a packed batch is one row
        out = VARLEN(
            q,
            k,
            v,
            starts,
            starts,
            longest,
            longest,
            scale=self.scale,
            window_size=(-1, 0),
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return out[..., :size].unsqueeze(1)
