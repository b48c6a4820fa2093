"""Self-attention for the local layer spec: Megatron's parameters and parallel linears, torch's SDPA as its core."""

from __future__ import annotations

import copy
import math
from typing import Optional

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import attention as mcore_attention
from megatron.core.transformer.identity_op import IdentityOp

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.megatron.norm import SplitRMSNorm
from primus_bridge.megatron.rotary import apply_rotary, cos_and_sin, layer_cos_sin, rotate

# queries at a time where the scores have to be made: with a window, or with a soft cap
QUERY_BLOCK = 1024


class SDPACoreAttention(torch.nn.Module):
    """Causal attention through torch's fused kernels (flash on GPU and CPU); no whole mask is ever materialised.

    query [s, b, heads, d], key [s, b, groups, d], value [s, b, groups, dv] -> [s, b, heads * dv].
    Right padding needs no mask: no real token can see a later, padded one.
    """

    def __init__(self, config, layer_number: int, arch: Architecture, **unused):
        super().__init__()
        self.scale = arch.softmax_scale or 1.0 / math.sqrt(arch.kv_channels)
        self.window = arch.window(layer_number - 1)
        self.softcap = arch.attention_softcap
        self.dropout = config.attention_dropout

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        s, b, heads, _ = query.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        p = self.dropout if self.training else 0.0
        if p > 0:
            # heads are split over tensor-parallel ranks, so each rank draws from its own RNG state
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out = self._attend(q, k, v, p)
        else:
            out = self._attend(q, k, v, p)
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: float) -> torch.Tensor:
        """[b, heads, s, d], [b, groups, s, d], [b, groups, s, dv] -> [b, heads, s, dv]."""
        s = q.shape[2]
        window = self.window if self.window is not None and self.window < s else None
        if self.softcap is None and window is None:
            return self._fused(q, k, v, p, None)
        block = max(window, 128) if window else QUERY_BLOCK
        out = []
        for start in range(0, s, block):
            stop = min(start + block, s)
            # the first key that the first query of the block sees
            first = max(0, start - window + 1) if window else 0
            parts = (q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop])
            distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            if self.softcap is None:
                out.append(self._fused(*parts, p, seen))
            elif self.training and torch.is_grad_enabled() and s > block:
                # the scores of a block are made again in the backward pass: only one block's are ever kept
                out.append(torch.utils.checkpoint.checkpoint(self._capped, *parts, p, seen, use_reentrant=False))
            else:
                out.append(self._capped(*parts, p, seen))
        return torch.cat(out, dim=2)

    def _fused(self, q, k, v, p: float, seen: Optional[torch.Tensor]) -> torch.Tensor:
        grouped = k.shape[1] != q.shape[1]
        if grouped and q.is_cuda and (q.dtype == torch.float32 or seen is not None):
            # no fused fp32 or masked kernel on a GPU takes groups: it would fall back to one that stores s x s scores
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            grouped = False
        size = v.shape[-1]
        if size < q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - size))  # the fused kernels want one size for all three
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=self.scale, dropout_p=p, enable_gqa=grouped
        )
        return out[..., :size]

    def _capped(self, q, k, v, p: float, seen: torch.Tensor) -> torch.Tensor:
        """Scores through cap * tanh(scores / cap). Source: Gemma 2, 2024."""
        assert self.softcap is not None
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.tanh(q @ k.transpose(2, 3) * (self.scale / self.softcap)) * self.softcap
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1, dtype=torch.float32).to(q.dtype)
        return (F.dropout(weights, p) if p else weights) @ v


class _SplitRotate(torch.autograd.Function):
    """qkv [s, b, groups, per group + 2, d] -> query, key, value, with rotary on the first two (when given).

    One function, because the gradients of three slices would otherwise be three zero-filled copies of qkv.
    """

    @staticmethod
    def forward(ctx, qkv, cos_sin, interleaved):
        s, b, groups, heads, d = qkv.shape
        ctx.save_for_backward(cos_sin)
        ctx.rotated, ctx.interleaved = cos_sin is not None, interleaved
        query, key, value = qkv.split((heads - 2, 1, 1), dim=3)
        if ctx.rotated:
            cos, sin = cos_and_sin(cos_sin, qkv, dims=5)
            query = rotate(query, cos, sin, qkv.new_empty(query.shape), interleaved)
            key = rotate(key, cos, sin, qkv.new_empty(key.shape), interleaved)
        return query.reshape(s, b, groups * (heads - 2), d), key.reshape(s, b, groups, d), value.squeeze(3).clone()

    @staticmethod
    def backward(ctx, grad_query, grad_key, grad_value):
        (cos_sin,) = ctx.saved_tensors
        s, b, groups, d = grad_key.shape
        per_group = grad_query.shape[2] // groups
        out = grad_key.new_empty(s, b, groups, per_group + 2, d)
        to_query, to_key, to_value = out.split((per_group, 1, 1), dim=3)
        grad_query, grad_key = grad_query.view(to_query.shape), grad_key.unsqueeze(3)
        if ctx.rotated:
            cos, sin = cos_and_sin(cos_sin, out, dims=5)
            rotate(grad_query, cos, -sin, to_query, ctx.interleaved)
            rotate(grad_key, cos, -sin, to_key, ctx.interleaved)
        else:
            to_query.copy_(grad_query)
            to_key.copy_(grad_key)
        to_value.copy_(grad_value.unsqueeze(3))
        return out, None, None


class SelfAttention(mcore_attention.SelfAttention):
    """megatron.core's SelfAttention with a forward pass of its own: rotary from cos and sin, no inference branches.

    Parameters, their names and their sharding are the parent's. What the parent has no switch for comes from ``arch``:
    biases of either linear, norms over all heads, windows, soft caps, partial and interleaved rotary.
    """

    def __init__(self, config, submodules, layer_number: int, arch: Architecture, **options):
        # the parent has one switch for the biases of both linears
        config = copy.copy(config)
        config.add_bias_linear, config.add_qkv_bias = arch.attention_out_bias, arch.qkv_bias
        super().__init__(config, submodules, layer_number, **options)
        self.clip = arch.clip_qkv
        self.interleaved = arch.rope is not None and arch.rope.interleaved
        self.rope = int(arch.local_rope is not None and arch.window(layer_number - 1) is not None)
        self.norm_all_heads = arch.qk_norm == "all"
        if self.norm_all_heads:
            tp = self.pg_collection.tp
            self.q_layernorm = SplitRMSNorm(arch.q_size, config.layernorm_epsilon, tp)
            self.k_layernorm = SplitRMSNorm(arch.kv_size, config.layernorm_epsilon, tp)

    def forward(self, hidden_states, attention_mask=None, rotary_pos_emb=None, **unused):
        """hidden_states [s, b, h] (a sequence-parallel part of s) -> ([s, b, h], bias or None)."""
        qkv, _ = self.linear_qkv(hidden_states)
        cos_sin = layer_cos_sin(rotary_pos_emb, self.rope)
        s, b, _ = qkv.shape
        if self.world_size > self.config.num_query_groups:
            qkv = self._own_heads(qkv)
        else:
            qkv = qkv.view(s, b, self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        if isinstance(self.q_layernorm, IdentityOp) and self.clip is None:
            query, key, value = _SplitRotate.apply(qkv, cos_sin, self.interleaved)
        else:
            query, key, value = _SplitRotate.apply(qkv, None, False)
            query, key = self._normed(query, self.q_layernorm), self._normed(key, self.k_layernorm)
            if self.clip is not None:
                query, key, value = (t.clamp(-self.clip, self.clip) for t in (query, key, value))
            if cos_sin is not None:
                query = apply_rotary(query, cos_sin, self.interleaved)
                key = apply_rotary(key, cos_sin, self.interleaved)
        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(self.core_attention, False, query, key, value)
        else:
            context = self.core_attention(query, key, value)
        return self.linear_proj(context)

    def _normed(self, x: torch.Tensor, norm) -> torch.Tensor:
        return norm(x.flatten(2)).view(x.shape) if self.norm_all_heads else norm(x)

    def _own_heads(self, qkv: torch.Tensor) -> torch.Tensor:
        """More ranks than groups: this rank's query heads with the k and v of their group.

        Megatron cuts the fused parameter into equal rows, wherever that falls in a group; so the ranks exchange the
        activations. [s, b, part] -> [s, b, 1, own heads + 2, d].
        """
        groups, d = self.config.num_query_groups, self.hidden_size_per_attention_head
        # its backward sums what the ranks of a group give for the shared k and v
        whole = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(qkv, group=self.pg_collection.tp)
        s, b, _ = whole.shape
        ranks = self.world_size // groups
        group, place = divmod(self.pg_collection.tp.rank(), ranks)
        mine = whole.view(s, b, groups, -1, d)[:, :, group : group + 1]
        own = (mine.shape[3] - 2) // ranks
        return torch.cat((mine[:, :, :, place * own : (place + 1) * own], mine[:, :, :, -2:]), dim=3)
