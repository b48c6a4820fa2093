"""Names of this rank's parameters in the whole model: layer numbers are global, norms named as in checkpoints."""

from __future__ import annotations

import re
from typing import Iterable

import torch

from primus_bridge.megatron.model import GPTModel

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# the local spec keeps the norm beside the linear that Transformer Engine fuses it into
_LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def global_name(name: str, chunk: GPTModel) -> str:
    """Layer 0 of the second of two stages -> "decoder.layers.2...", with the norm under its checkpoint name."""
    name = name.replace(".to_wrap.", ".")
    match = _LAYER.match(name)
    if not match:
        return name
    layer = chunk.decoder.layers[int(match[1])].layer_number - 1
    rest = name[match.end() :]
    return f"decoder.layers.{layer}.{_LOCAL_NORMS.get(rest, rest)}"


def global_parameters(chunks: Iterable[GPTModel]) -> dict[str, torch.nn.Parameter]:
    """Every parameter of this rank's chunks by its name in the whole model, adapters included."""
    return {global_name(name, chunk): parameter for chunk in chunks for name, parameter in chunk.named_parameters()}
