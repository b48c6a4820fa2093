"""The GPT model on Megatron-Core: its config, its layer spec, and its chunks on this rank."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Optional

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel as MCoreGPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.megatron import moe
from primus_bridge.megatron.attention import SelfAttention
from primus_bridge.megatron.context_parallel import own_part
from primus_bridge.megatron.core_attention import SDPACoreAttention
from primus_bridge.megatron.cross_entropy import label_log_probs
from primus_bridge.megatron.documents import Documents
from primus_bridge.megatron.latent_attention import LatentAttention
from primus_bridge.megatron.layer import TransformerLayer, checkpoint_names, norm_class
from primus_bridge.megatron.mlp import ACTIVATIONS, MLP
from primus_bridge.megatron.neftune import batch_noise
from primus_bridge.megatron.norm import RMSNorm
from primus_bridge.megatron.parallel import Parallel
from primus_bridge.megatron.rotary import RotaryEmbedding, inverse_frequencies
from primus_bridge.megatron.turbo import kernels_used, use_kernels


def use_transformer_engine(arguments: BridgeArguments, arch: Architecture) -> bool:
    """The TE layer spec needs a GPU and an installed transformer-engine; else the local spec is used.

    LoRA takes the local spec too: TE's linears have the norm inside, whose output the adapters beside them must read.
    So does an architecture beyond the Llama and Qwen shape, which TE's spec has no place for; and so do packed
    sequences, context parallelism and NEFTune, whose documents are our own attention's, and Primus-Turbo's kernels.
    """
    there = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    plain = arguments.peft.scheme is None and not arguments.dataset.packed_sequence
    turbo = kernels_used(arguments.model, arguments.dist.device)
    plain = plain and not arguments.train.neftune_noise_alpha and not turbo
    return there and plain and arguments.model.context_parallel_size == 1 and _llama_shaped(arch, arguments)


def _llama_shaped(arch: Architecture, arguments: BridgeArguments) -> bool:
    rope = arch.rope
    plain_rope = (
        rope is not None
        and not rope.interleaved
        and rope.dim == arch.kv_channels
        and (rope.scaling is None or rope.scaling["rope_type"] not in ("dynamic", "longrope"))
    )
    usual = Architecture(
        **{name: getattr(arch, name) for name in _SIZES},
        rope=rope,
        tied_embeddings=arch.tied_embeddings,
        qkv_bias=arch.qkv_bias,
        qk_norm="head" if arch.qk_norm == "head" else None,
        windows=() if not any(arch.windows) else arch.windows,
        init_std=arch.init_std,
        hf_config=arch.hf_config,
    )
    same = all(getattr(arch, name) == getattr(usual, name) for name in vars(usual) if name != "windows")
    grouped = arguments.model.tensor_model_parallel_size <= arch.num_query_groups
    return plain_rope and same and not any(arch.windows) and grouped


_SIZES = (
    "model_type",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "layernorm_epsilon",
    "max_position_embeddings",
)


def params_dtype(arguments: BridgeArguments) -> torch.dtype:
    return torch.bfloat16 if arguments.mixed_precision == "bf16_mixed" else torch.float32


def transformer_config(arch: Architecture, arguments: BridgeArguments, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's config for this architecture and layout; every switch that differs from Megatron's default is here."""
    model = arguments.model
    interleaved = bool(model.virtual_pipeline_model_parallel_size)
    recompute = model.recompute_granularity
    fused = use_transformer_engine(arguments, arch)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.layernorm_epsilon,
        init_method_std=arch.init_std,
        normalization="RMSNorm" if arch.norm == "rms" else "LayerNorm",
        layernorm_zero_centered_gamma=arch.zero_centered_norm,
        gated_linear_unit=arch.gated_mlp,
        activation_func=ACTIVATIONS[arch.activation],
        # the modules that have biases say so themselves, from the architecture
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm == "head",
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
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
        softmax_scale=_fused_softmax_scale(arch) if fused else None,
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
        **moe.config_fields(arch, model),
    )


def _fused_softmax_scale(arch: Architecture) -> Optional[float]:
    """YaRN scales cos and sin, so q and k alike: with TE, which takes no such factor, the softmax scale carries it."""
    assert arch.rope is not None
    factor = inverse_frequencies(arch.rope)[1]
    return factor**2 / math.sqrt(arch.kv_channels) if factor != 1.0 else None


def layer_spec(arch: Architecture, layer: int) -> ModuleSpec:
    """One layer of the local spec: Megatron's linears in our attention, MLP and norms. ``layer`` counts from 0."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm == "head")
    spec.module, spec.params = TransformerLayer, {"arch": arch}
    parts, norm = spec.submodules, norm_class(arch)
    parts.input_layernorm = norm if arch.residual != "post" else IdentityOp
    parts.pre_mlp_layernorm = norm if arch.residual not in ("post", "parallel one norm") else IdentityOp
    parts.sharded_state_dict_keys_map = checkpoint_names(arch, layer)
    attention = parts.self_attention
    if arch.mla is not None:
        parts.self_attention = ModuleSpec(module=LatentAttention, params={"arch": arch})
    else:
        attention.module, attention.params = SelfAttention, {**attention.params, "arch": arch}
        attention.submodules.core_attention = _core_attention(arch)
        if arch.qk_norm == "head":
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    if arch.has_experts(layer):
        parts.mlp = moe.moe_spec(arch)
    else:
        parts.mlp.module, parts.mlp.params = MLP, {"arch": arch}
    return spec


def _core_attention(arch: Architecture):
    def build(config, layer_number, pg_collection, **unused):
        return SDPACoreAttention(config, layer_number, arch, pg_collection.cp)

    return build


def block_spec(
    config: TransformerConfig, arch: Architecture, vp_stage: Optional[int], fused: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """A chunk's layers: Transformer Engine's fused ones, or the local spec."""
    if fused:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(arch, layer) for layer in layers], layer_norm=norm_class(arch)
    )


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
        noise_alpha: Optional[float] = None,
        **ends,
    ):
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, arch, vp_stage, fused),
            vocab_size=padded_vocab_size,
            max_sequence_length=seq_length if arch.rope else arch.max_position_embeddings,
            position_embedding_type="rope" if arch.rope else "learned_absolute",
            share_embeddings_and_output_weights=arch.tied_embeddings,
            vp_stage=vp_stage,
            **ends,
        )
        self.arch, self.noise_alpha, self.fused = arch, noise_alpha, fused
        if arch.rope is None:
            return
        rotary = RotaryEmbedding([arch.rope] + ([arch.local_rope] if arch.local_rope else []), seq_length)
        if fused:
            # TE applies Megatron's rope: hand it our frequencies
            theirs: Any = self.get_submodule("rotary_pos_emb")
            theirs.inv_freq = inverse_frequencies(arch.rope)[0].to(theirs.inv_freq.device)
        else:
            self.rotary_pos_emb = rotary

    def _preprocess(
        self,
        input_ids,
        position_ids,
        decoder_input=None,
        inference_context=None,
        packed_seq_params: Optional[Documents] = None,
        padding_mask=None,
    ):
        """First stage: the embeddings, with NEFTune's noise, scaled as the architecture has it, in their own dtype as
        transformers does; every stage: rotary by position. The layers get ``packed_seq_params`` as it is."""
        if self.fused:
            hidden, *rest = super()._preprocess(input_ids, position_ids)
        else:
            hidden = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
            longest = position_ids.shape[1] * self.config.context_parallel_size
            rest = [self.rotary_pos_emb(position_ids, longest) if self.arch.rope else None, *[None] * 4]
        if self.pre_process:
            if self.training and self.noise_alpha:
                assert packed_seq_params is not None, "NEFTune needs the batch's noise_seeds"
                hidden = hidden + self._noise(hidden, packed_seq_params, self.noise_alpha)
            if self.arch.embedding_multiplier != 1.0:
                hidden = hidden * torch.tensor(self.arch.embedding_multiplier, dtype=hidden.dtype)
        return (hidden, *rest)

    def _noise(self, hidden: torch.Tensor, documents: Documents, alpha: float) -> torch.Tensor:
        """This rank's part of the micro-batch's noise, in the shape, dtype and place of hidden [s, b, h]."""
        own, rows, size = hidden.shape
        tp, cp = self.pg_collection.tp, self.pg_collection.cp
        parts = tp.size() if self.config.sequence_parallel else 1
        noise = own_part(batch_noise(documents, rows, own * parts * cp.size(), size, alpha), 0, cp.rank(), cp.size())
        return (noise.narrow(0, tp.rank() * own, own) if parts > 1 else noise).to(hidden)

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
            vocab_rows=max(0, min(weight.shape[0], self.arch.vocab_size - start)),
            group=tp_group if tp_group.size() > 1 else None,
            divisor=self.arch.logits_divisor,
            softcap=self.arch.logit_softcap,
        )
        return torch.zeros(labels.shape, dtype=torch.float32, device=labels.device).masked_scatter(
            supervised, log_probs
        )

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits fp32 [b, s, vocab] of one pipeline stage that holds the whole model; for comparisons and tests."""
        assert self.pre_process and self.post_process
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None].expand_as(input_ids)
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(self(input_ids, positions, None))
        return self.scaled_logits(whole[..., : self.arch.vocab_size])

    def scaled_logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits fp32 from what the output layer gives."""
        logits = outputs.float() / self.arch.logits_divisor
        cap = self.arch.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits


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
            fused=use_transformer_engine(arguments, arch),
            noise_alpha=arguments.train.neftune_noise_alpha,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        )
        _mark_tensor_parallel(chunk)
        if parallel.etp_size != parallel.tp_size:
            moe.mark_experts(chunk)
        use_kernels(chunk, arguments.model, arguments.dist.device)
        if torch.cuda.is_available():
            chunk.cuda()
        chunks.append(chunk.to(dtype))
    return chunks
