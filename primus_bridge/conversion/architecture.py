"""Architecture: what a Hugging Face config.json says about a decoder, in one typed object."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Optional


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's correction of the attention scores for a context longer by ``factor``. Source: Peng et al. 2023."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """Rotary positions: ``dim`` of each head's dimensions are turned, the first ones; the rest is left as it is.

    scaling: the parameters of its kind, as config.json has them (None: plain). interleaved: neighbours form the pairs,
    not the two halves. max_positions: max_position_embeddings, which some kinds scale by.
    """

    base: float
    dim: int
    max_positions: int
    scaling: Optional[dict] = None
    interleaved: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values come from one small vector a token. Source: DeepSeek-V2, 2024."""

    q_lora_rank: Optional[int]
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class MixtureOfExperts:
    """layers: which layers have experts in place of the MLP; the others have an MLP of ffn_hidden_size.

    The router scores all experts by softmax or sigmoid, keeps the top_k (of the best ``top_groups`` of ``groups``, a
    group counting by the sum of its ``group_scores`` best experts), makes them sum to 1 if ``normalise``, and scales
    them. selection_bias: added to the scores for the choice only. shared_gate: the shared expert's output is scaled
    by a sigmoid of its own.
    """

    layers: tuple[bool, ...]
    num_experts: int
    top_k: int
    ffn_hidden_size: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_scores: int = 1
    selection_bias: bool = False
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class Architecture:
    """Shape of a model, read by the model builder, the rules and the planner; sizes are of the whole model."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    max_position_embeddings: int
    rope: Optional[Rope] = None
    """None: positions are learned, max_position_embeddings of them."""
    local_rope: Optional[Rope] = None
    """Of the layers that have a window, where it is another than ``rope``."""
    tied_embeddings: bool = False
    norm: Literal["rms", "layer"] = "rms"
    zero_centered_norm: bool = False
    """The norm's weight is stored less 1."""
    residual: Literal["pre", "post", "sandwich", "parallel", "parallel one norm"] = "pre"
    """Where norms lie: before attention and MLP, after both, around both; or before both, which then run side by side
    (with one norm between them)."""
    qk_norm: Optional[Literal["head", "all"]] = None
    """RMSNorm on q and k: over each head, or over all heads together."""
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    windows: tuple[Optional[int], ...] = ()
    """For each layer how many positions a token sees, itself included; None: all before it. Empty: all layers None."""
    softmax_scale: Optional[float] = None
    """None: 1 / sqrt(size of a query head)."""
    attention_softcap: Optional[float] = None
    logit_softcap: Optional[float] = None
    clip_qkv: Optional[float] = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    mla: Optional[LatentAttention] = None
    moe: Optional[MixtureOfExperts] = None
    init_std: float = 0.02
    hf_config: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    @property
    def attention_size(self) -> int:
        """What attention puts out, before its output projection."""
        return self.num_attention_heads * (self.mla.v_head_dim if self.mla else self.kv_channels)

    @property
    def kv_down_size(self) -> int:
        """Latent attention: the latent vector and the one rotated key of all heads."""
        assert self.mla is not None
        return self.mla.kv_lora_rank + self.mla.qk_rope_head_dim

    @property
    def kv_up_size(self) -> int:
        """Latent attention: each head's key without positions, and its value."""
        assert self.mla is not None
        return self.num_attention_heads * (self.mla.qk_nope_head_dim + self.mla.v_head_dim)

    def window(self, layer: int) -> Optional[int]:
        """Positions that a token of ``layer`` (from 0) sees; None: all before it."""
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and self.moe.layers[layer]

    def padded_vocab_size(self, divisible_by: int, tensor_parallel: int) -> int:
        """The vocabulary rounded up to a multiple of both: the same for every usual tensor-parallel size."""
        multiple = math.lcm(divisible_by, tensor_parallel)
        return -(-self.vocab_size // multiple) * multiple

    def size(self, name: str | int) -> int:
        """A dimension as the rule tables write it: a name ("hidden_size", "q_size", "moe.num_experts") or a number."""
        if isinstance(name, int):
            return name
        owner: Any = self
        for part in name.split("."):
            owner = getattr(owner, part)
        return owner
