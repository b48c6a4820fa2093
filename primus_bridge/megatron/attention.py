"""Self-attention for the local layer spec: Megatron's parameters and parallel linears, our rotary, our core."""

from __future__ import annotations

import copy
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import attention as mcore_attention
from megatron.core.transformer.identity_op import IdentityOp

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.megatron.norm import SplitRMSNorm
from primus_bridge.megatron.rotary import apply_rotary, cos_and_sin, layer_cos_sin, rotate


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
        # copies, also where a view would do: what keeps a view for the backward pass keeps all of qkv
        query, key = query.reshape(s, b, groups * (heads - 2), d).contiguous(), key.squeeze(3).contiguous()
        return query, key, value.squeeze(3).clone()

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


def run_core(module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents) -> torch.Tensor:
    """module.core_attention, made again in the backward pass where the module's checkpoint_core_attention asks so."""
    core = partial(module.core_attention, documents=documents)
    if module.checkpoint_core_attention and module.training:
        return tensor_parallel.checkpoint(core, False, query, key, value)
    return core(query, key, value)


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

    def forward(self, hidden_states, attention_mask=None, rotary_pos_emb=None, packed_seq_params=None, **unused):
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
        return self.linear_proj(run_core(self, query, key, value, packed_seq_params))

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
