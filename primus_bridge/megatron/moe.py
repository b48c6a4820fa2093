"""Mixture of experts for the local layer spec: megatron.core's MoE layer, its router scoring as the model does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from primus_bridge.conversion.architecture import Architecture, MixtureOfExperts


def config_fields(arch: Architecture, model) -> dict[str, Any]:
    """The fields of TransformerConfig that experts need. model: ModelArguments."""
    moe = arch.moe
    if moe is None:
        return {}
    return dict(
        num_moe_experts=moe.num_experts,
        moe_layer_freq=[int(has) for has in moe.layers],
        moe_router_topk=moe.top_k,
        moe_router_pre_softmax=True,  # asked for where top_k is 1; our router scores in its own way
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size or None,
        moe_shared_expert_gate=moe.shared_gate,
        moe_token_dispatcher_type="alltoall",
        # fine-tuning keeps the router as it was trained: no balancing loss, no moving bias
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
    )


def choose_experts(logits: torch.Tensor, bias: torch.Tensor | None, moe: MixtureOfExperts):
    """logits fp32 [tokens, experts] -> (weights [tokens, top_k], experts [tokens, top_k]).

    As the models' own code: Mixtral, Qwen2-MoE, DeepSeek-V2 (softmax), DeepSeek-V3 (sigmoid, groups by two experts).
    """
    scores = logits.softmax(dim=-1) if moe.score == "softmax" else logits.sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias
    if moe.groups > 1:
        grouped = choice.unflatten(-1, (moe.groups, -1))
        best = grouped.topk(moe.group_scores, dim=-1).values.sum(-1).topk(moe.top_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    experts = choice.topk(moe.top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if moe.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * moe.scaling, experts


class Router(TopKRouter):
    """megatron.core's router, its weight and place, with the model's own choice of experts.

    Scores are computed in fp32. The bias on the choice is a buffer in fp32: fine-tuning does not move it.
    """

    def __init__(self, config, arch: Architecture, pg_collection=None):
        super().__init__(config=config, pg_collection=pg_collection)
        assert arch.moe is not None
        self.moe = arch.moe
        if self.moe.selection_bias:
            del self.expert_bias  # the parent's, None
            self.register_buffer("expert_bias", torch.zeros(self.moe.num_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # as the parent of it does before each use: a cast of the model must not round the bias
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and not self.expert_bias.is_meta:
            self.expert_bias = before.to(self.expert_bias.device)
        return self

    def forward(self, input: torch.Tensor, padding_mask=None):
        """[s, b, h] -> (probabilities [s * b, experts], which experts bool [s * b, experts])."""
        logits = F.linear(input.flatten(0, -2).float(), self.weight.float())
        weights, experts = choose_experts(logits, self.expert_bias, self.moe)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
        return torch.zeros_like(logits).scatter(1, experts, weights), chosen


def moe_spec(arch: Architecture) -> ModuleSpec:
    """megatron.core's MoE layer: experts one after the other, and the router above."""
    assert arch.moe is not None
    spec = get_moe_module_spec(use_te=False, num_experts=arch.moe.num_experts, moe_grouped_gemm=False)
    assert isinstance(spec.submodules, MoESubmodules)

    def router(config, pg_collection=None):
        return Router(config, arch, pg_collection)

    spec.submodules.router = router
    return spec


def mark_experts(chunk: torch.nn.Module) -> None:
    """Let the gradients of experts be reduced over the ranks that hold copies of them.

    megatron.core marks them only when experts are shared out over ranks; with tensor-parallel ranks that each hold
    whole experts (expert_tensor_parallel_size 1) each would keep what its own tokens say.
    """
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False
