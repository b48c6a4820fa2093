"""Architecture: what a Hugging Face config.json says about a dense decoder, in one typed object."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional


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
    rotary_base: float
    max_position_embeddings: int
    rope_scaling: Optional[dict] = None
    tied_embeddings: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    init_std: float = 0.02
    hf_config: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        return self.num_query_groups * self.kv_channels

    def padded_vocab_size(self, divisible_by: int, tensor_parallel: int) -> int:
        """The vocabulary rounded up to a multiple of both: the same for every usual tensor-parallel size."""
        multiple = math.lcm(divisible_by, tensor_parallel)
        return -(-self.vocab_size // multiple) * multiple

    def size(self, name: str) -> int:
        """A dimension by name, as the rule tables write shapes ("hidden_size", "q_size", ...)."""
        return getattr(self, name)
