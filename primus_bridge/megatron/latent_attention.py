"""Multi-head latent attention for the local layer spec: Megatron's parameter names, torch's SDPA as its core.

megatron.core's MLASelfAttention brings its own rope, which takes YaRN only, and needs Transformer Engine for its
replicated projections. Source: DeepSeek-V2, 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.megatron.attention import run_core
from primus_bridge.megatron.core_attention import SDPACoreAttention
from primus_bridge.megatron.norm import RMSNorm
from primus_bridge.megatron.rotary import apply_rotary

# what the released models have, whatever their rms_norm_eps
LATENT_NORM_EPSILON = 1e-6


class ReplicatedLinear(torch.nn.Module):
    """x @ weight^T with the whole weight [out, in] on every tensor-parallel rank; signature as Megatron's linears."""

    def __init__(self, inputs: int, outputs: int, config):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs))
        # under sequence parallelism each rank sees its part of the tokens: Megatron sums such gradients
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class LatentAttention(MegatronModule):
    """q from a small vector (or at once), k and v from another, a rotated key shared by all heads."""

    def __init__(self, config, layer_number: int, arch: Architecture, pg_collection=None, **unused):
        super().__init__(config=config)
        assert arch.mla is not None
        self.mla, self.pg_collection = arch.mla, pg_collection
        mla, tp = self.mla, pg_collection.tp
        self.heads = arch.num_attention_heads // tp.size()
        self.interleaved = arch.rope is not None and arch.rope.interleaved

        def column(inputs: int, outputs: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inputs,
                outputs,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=tp,
            )

        if mla.q_lora_rank is None:
            self.linear_q_proj = column(arch.hidden_size, arch.q_size)
        else:
            self.linear_q_down_proj = ReplicatedLinear(arch.hidden_size, mla.q_lora_rank, config)
            self.q_layernorm = RMSNorm(config, mla.q_lora_rank, LATENT_NORM_EPSILON)
            self.linear_q_up_proj = column(mla.q_lora_rank, arch.q_size)
        self.linear_kv_down_proj = ReplicatedLinear(arch.hidden_size, arch.kv_down_size, config)
        self.kv_layernorm = RMSNorm(config, mla.kv_lora_rank, LATENT_NORM_EPSILON)
        self.linear_kv_up_proj = column(mla.kv_lora_rank, arch.kv_up_size)
        self.core_attention = SDPACoreAttention(config, layer_number, arch, pg_collection.cp)
        self.checkpoint_core_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )
        self.linear_proj = RowParallelLinear(
            arch.attention_size,
            arch.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tp,
        )

    def forward(self, hidden_states, attention_mask=None, rotary_pos_emb=None, packed_seq_params=None, **unused):
        """hidden_states [s, b, h] (a sequence-parallel part of s) -> ([s, b, h], bias or None)."""
        mla = self.mla
        if mla.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)[0]))
        latent, _ = self.linear_kv_down_proj(hidden_states)
        latent, shared_key = latent.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
        key_value, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        tp = self.pg_collection.tp
        # every rank's heads use the one rotated key: backward sums what they give for it
        if self.config.sequence_parallel:
            shared_key = tensor_parallel.gather_from_sequence_parallel_region(shared_key, group=tp)
        else:
            shared_key = tensor_parallel.copy_to_tensor_model_parallel_region(shared_key, group=tp)
        s, b, _ = query.shape
        query = query.view(s, b, self.heads, -1)
        key, value = key_value.view(s, b, self.heads, -1).split((mla.qk_nope_head_dim, mla.v_head_dim), dim=-1)
        plain, turned = query.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), dim=-1)
        turned = apply_rotary(turned, rotary_pos_emb, self.interleaved)
        shared_key = apply_rotary(shared_key.unsqueeze(2), rotary_pos_emb, self.interleaved)
        query = torch.cat((plain, turned), dim=-1)
        key = torch.cat((key, shared_key.expand(-1, -1, self.heads, -1)), dim=-1)
        return self.linear_proj(run_core(self, query, key, value, packed_seq_params))
