"""The GPT model on Megatron-Core: its config, its layer spec, and its chunks on this rank."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.megatron.attention import SDPACoreAttention, SelfAttention
from primus_bridge.megatron.cross_entropy import label_log_probs
from primus_bridge.megatron.mlp import GatedMLP
from primus_bridge.megatron.norm import RMSNorm
from primus_bridge.megatron.parallel import Parallel
from primus_bridge.megatron.rotary import RotaryEmbedding, inverse_frequencies


def use_transformer_engine(arguments: BridgeArguments) -> bool:
    """The TE layer spec needs a GPU and an installed transformer-engine; else the local spec is used.

    LoRA takes the local spec too: TE's linears have the norm inside, whose output the adapters beside them must read.
    """
    there = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    return there and arguments.peft.scheme is None


def params_dtype(arguments: BridgeArguments) -> torch.dtype:
    return torch.bfloat16 if arguments.mixed_precision == "bf16_mixed" else torch.float32


def transformer_config(arch: Architecture, arguments: BridgeArguments, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's config for this architecture and layout; every switch that differs from Megatron's default is here."""
    model = arguments.model
    interleaved = bool(model.virtual_pipeline_model_parallel_size)
    recompute = model.recompute_granularity
    config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.layernorm_epsilon,
        init_method_std=arch.init_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.add_qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=model.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=model.num_layers_in_last_pipeline_stage,
        sequence_parallel=model.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        recompute_granularity=recompute,
        recompute_method=(model.recompute_method or "uniform") if recompute == "full" else None,
        recompute_num_layers=(model.recompute_num_layers or 1) if recompute == "full" else None,
        calculate_per_token_loss=True,
        softmax_scale=_softmax_scale(arch) if use_transformer_engine(arguments) else None,
        # the weights come from a Hugging Face folder, a checkpoint or our own seeded source, never from Megatron's init
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        # with two pipeline ranks 0.16 mixes up the batched sends of neighbouring chunks and gives wrong losses
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
    )
    return config


def _softmax_scale(arch: Architecture) -> Optional[float]:
    """YaRN scales cos and sin, so q and k alike: with TE, which takes no such factor, the softmax scale carries it."""
    factor = inverse_frequencies(arch.kv_channels, arch.rotary_base, arch.rope_scaling)[1]
    return factor**2 / math.sqrt(arch.kv_channels) if factor != 1.0 else None


def _residual_add(training: bool, fused: bool):
    """Megatron's bias-dropout-add without the dropout, which on a CPU draws and multiplies a mask even at p = 0."""

    def add(output_with_bias, residual, dropout):
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        if dropout and training:
            output = F.dropout(output, p=dropout, training=True)
        return residual + output

    return add


def block_spec(
    config: TransformerConfig, vp_stage: Optional[int], fused: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """A chunk's layers: Transformer Engine's fused ones, or the local spec with our attention and norms."""
    if fused:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    layer.self_attn_bda = layer.mlp_bda = _residual_add
    layer.mlp.module = GatedMLP
    attention = layer.self_attention
    attention.module = SelfAttention
    attention.submodules.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


class GPTModel(MCoreGPTModel):
    """megatron.core's GPTModel whose last stage returns log-probabilities of the labels, only where they count."""

    def __init__(
        self,
        config: TransformerConfig,
        arch: Architecture,
        padded_vocab_size: int,
        seq_length: int,
        vp_stage: Optional[int],
        fused: bool,
        **ends,
    ):
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, vp_stage, fused),
            vocab_size=padded_vocab_size,
            max_sequence_length=seq_length,
            position_embedding_type="rope",
            rotary_base=arch.rotary_base,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            vp_stage=vp_stage,
            **ends,
        )
        self.real_vocab_size = arch.vocab_size
        rotary = RotaryEmbedding(arch.kv_channels, arch.rotary_base, arch.rope_scaling)
        if fused:
            # TE applies Megatron's rope: hand it our frequencies
            theirs: Any = self.get_submodule("rotary_pos_emb")
            theirs.inv_freq = rotary.inv_freq.to(theirs.inv_freq.device)
        else:
            self.rotary_pos_emb = rotary

    def _postprocess(self, hidden_states, labels=None, loss_mask=None, **kwargs):
        """Last stage: log p(label) fp32 [b, s], zero where loss_mask is; else the parent's hidden states or logits."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **kwargs)
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # its backward reduce-scatters: the sum over the vocabulary shards that hidden's gradient needs
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=tp_group)
        supervised = loss_mask > 0  # [b, s]
        hidden = hidden_states.transpose(0, 1)[supervised]
        if not self.config.sequence_parallel:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=tp_group)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        start = tp_group.rank() * weight.shape[0]
        log_probs = label_log_probs(
            hidden,
            weight,
            labels[supervised],
            vocab_start=start,
            vocab_rows=max(0, min(weight.shape[0], self.real_vocab_size - start)),
            group=tp_group if tp_group.size() > 1 else None,
        )
        return torch.zeros(labels.shape, dtype=torch.float32, device=labels.device).masked_scatter(
            supervised, log_probs
        )

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [b, s, vocab] of one pipeline stage that holds the whole model; for comparisons and tests."""
        assert self.pre_process and self.post_process
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
        local = self(input_ids, positions, None)
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(local)
        return whole[..., : self.real_vocab_size].float()


def _mark_tensor_parallel(chunk: GPTModel) -> None:
    """Say which weights are split: 0.16 sets these marks only when it initialises weights itself.

    Without them gradient norms count the shards of one rank only.
    """
    layers = tensor_parallel.layers
    dimension = {layers.ColumnParallelLinear: 0, layers.VocabParallelEmbedding: 0, layers.RowParallelLinear: 1}
    for module in chunk.modules():
        weight = getattr(module, "weight", None)
        if type(module) in dimension and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, dimension[type(module)], 1)


def build_model(
    arch: Architecture, arguments: BridgeArguments, parallel: Parallel, dtype: Optional[torch.dtype] = None
) -> list[GPTModel]:
    """This rank's model chunks (one, or virtual_pipeline_model_parallel_size), with uninitialised weights.

    The chunks are on the rank's device in ``dtype``; None: the run's parameter dtype.
    """
    dtype = dtype or params_dtype(arguments)
    config = transformer_config(arch, arguments, dtype)
    padded = arch.padded_vocab_size(arguments.model.make_vocab_size_divisible_by, parallel.tp_size)
    virtual = arguments.model.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(virtual or 1):
        stage: Optional[int] = vp_stage if virtual else None
        chunk = GPTModel(
            config,
            arch,
            padded,
            arguments.model.seq_length,
            vp_stage=stage,
            fused=use_transformer_engine(arguments),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        )
        _mark_tensor_parallel(chunk)
        if torch.cuda.is_available():
            chunk.cuda()
        chunks.append(chunk.to(dtype))
    return chunks
