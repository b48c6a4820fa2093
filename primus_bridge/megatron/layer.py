"""The transformer layer of the local spec: norms before, after or around, residuals in turn or side by side."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from megatron.core.transformer import transformer_layer as mcore_layer
from megatron.core.transformer.identity_op import IdentityOp

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.megatron.documents import Documents
from primus_bridge.megatron.norm import LayerNorm, RMSNorm

# our name of a module -> the prefix of its parameters in every Megatron checkpoint: the local spec keeps norms beside
# the linears that Transformer Engine fuses them into
CHECKPOINT_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "post_self_attn_layernorm.": "self_attention.linear_proj.post_layernorm.",
    "post_mlp_layernorm.": "mlp.linear_fc2.post_layernorm.",
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def checkpoint_names(arch: Architecture, layer: int) -> dict[str, str]:
    """CHECKPOINT_NAMES that hold in ``layer``: experts and latent attention have no linear that takes a norm in."""
    left_out = set()
    if arch.has_experts(layer):
        left_out.add("pre_mlp_layernorm.")
    if arch.mla is not None:
        left_out.add("input_layernorm.")
    else:
        left_out |= {"self_attention.q_layernorm.", "self_attention.kv_layernorm."}
    return {ours: theirs for ours, theirs in CHECKPOINT_NAMES.items() if ours not in left_out}


def norm_class(arch: Architecture) -> type[torch.nn.Module]:
    return RMSNorm if arch.norm == "rms" else LayerNorm


class TransformerLayer(mcore_layer.TransformerLayer):
    """megatron.core's layer with a forward pass of its own, for every order of norms and residuals of ``arch``."""

    def __init__(self, config, submodules, arch: Architecture, **options):
        super().__init__(config, submodules, **options)
        self.side_by_side = arch.residual.startswith("parallel")
        self.one_norm = arch.residual == "parallel one norm"
        self.multiplier = arch.residual_multiplier
        self.post_self_attn_layernorm: torch.nn.Module = IdentityOp()
        self.post_mlp_layernorm: torch.nn.Module = IdentityOp()
        if arch.residual in ("post", "sandwich"):
            norm = norm_class(arch)
            self.post_self_attn_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
            self.post_mlp_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        context=None,
        rotary_pos_emb=None,
        packed_seq_params: Optional[Documents] = None,
        **unused,
    ):
        """hidden_states [s, b, h] -> (the same, context)."""
        normed = self.input_layernorm(hidden_states)
        attended = self._branch(
            self.self_attention(normed, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params)
        )
        if self.side_by_side:
            normed = normed if self.one_norm else self.pre_mlp_layernorm(hidden_states)
            return hidden_states + attended + self._branch(self.mlp(normed)), context
        hidden_states = self._add(hidden_states, self.post_self_attn_layernorm(attended))
        output = self._branch(self.mlp(self.pre_mlp_layernorm(hidden_states)))
        return self._add(hidden_states, self.post_mlp_layernorm(output)), context

    def _branch(self, output_with_bias) -> torch.Tensor:
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        if self.hidden_dropout and self.training:
            output = F.dropout(output, p=self.hidden_dropout, training=True)
        return output

    def _add(self, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.multiplier == 1.0:
            return residual + output
        return torch.add(residual, output, alpha=self.multiplier)
