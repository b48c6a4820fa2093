"""Self-attention for the local layer spec: Megatron's parameters and parallel linears, torch's SDPA as its core."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import attention as mcore_attention
from megatron.core.transformer.identity_op import IdentityOp

from primus_bridge.megatron.rotary import apply_rotary, half_cos_sin, rotate


class SDPACoreAttention(torch.nn.Module):
    """Causal attention through torch's fused kernels (flash on GPU and CPU); no mask is ever materialised.

    query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].
    Right padding needs no mask: no real token can see a later, padded one.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **unused):
        super().__init__()
        self.config = config
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        s, b, heads, d = query.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = k.shape[1] != heads
        if grouped and q.is_cuda and q.dtype == torch.float32:
            # no fused fp32 kernel on a GPU takes groups: it would fall back to one that stores s x s scores
            k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
            grouped = False
        p = self.dropout if self.training else 0.0
        if p > 0:
            # heads are split over tensor-parallel ranks, so each rank draws from its own RNG state
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=self.scale, dropout_p=p, enable_gqa=grouped
                )
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


class _SplitRotate(torch.autograd.Function):
    """qkv [s, b, groups, per group + 2, d] -> query, key, value, with rotary on the first two (when given).

    One function, because the gradients of three slices would otherwise be three zero-filled copies of qkv.
    """

    @staticmethod
    def forward(ctx, qkv, cos_sin):
        s, b, groups, heads, d = qkv.shape
        ctx.save_for_backward(cos_sin)
        ctx.rotated = cos_sin is not None
        query, key, value = qkv.split((heads - 2, 1, 1), dim=3)
        if ctx.rotated:
            cos, sin = half_cos_sin(cos_sin, qkv, dims=5)
            query = rotate(query, cos, sin, out=qkv.new_empty(query.shape))
            key = rotate(key, cos, sin, out=qkv.new_empty(key.shape))
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
            cos, sin = half_cos_sin(cos_sin, out, dims=5)
            rotate(grad_query, cos, -sin, out=to_query)
            rotate(grad_key, cos, -sin, out=to_key)
        else:
            to_query.copy_(grad_query)
            to_key.copy_(grad_key)
        to_value.copy_(grad_value.unsqueeze(3))
        return out, None


class SelfAttention(mcore_attention.SelfAttention):
    """megatron.core's SelfAttention with a forward pass of its own: rotary from cos and sin, no inference branches.

    Parameters, their names and their sharding are the parent's.
    """

    def forward(self, hidden_states, attention_mask=None, rotary_pos_emb=None, **unused):
        """hidden_states [s, b, h] (a sequence-parallel part of s) -> ([s, b, h], bias or None)."""
        qkv, _ = self.linear_qkv(hidden_states)
        s, b, _ = qkv.shape
        groups = self.num_query_groups_per_partition
        qkv = qkv.view(s, b, groups, -1, self.hidden_size_per_attention_head)
        if isinstance(self.q_layernorm, IdentityOp):
            query, key, value = _SplitRotate.apply(qkv, rotary_pos_emb)
        else:
            query, key, value = _SplitRotate.apply(qkv, None)
            query = apply_rotary(self.q_layernorm(query), rotary_pos_emb)
            key = apply_rotary(self.k_layernorm(key), rotary_pos_emb)
        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(self.core_attention, False, query, key, value)
        else:
            context = self.core_attention(query, key, value)
        return self.linear_proj(context)
