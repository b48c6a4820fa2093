"""Names of this rank's parameters in the whole model: layers and experts are numbered globally, norms named as in
checkpoints."""

from __future__ import annotations

import re
from typing import Iterable

import torch

from primus_bridge.megatron.layer import checkpoint_names
from primus_bridge.megatron.model import GPTModel

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.+)$")


def global_name(name: str, chunk: GPTModel) -> str:
    """Layer 0 of the second of two stages -> "decoder.layers.2...", with the norm under its checkpoint name."""
    name = name.replace(".to_wrap.", ".")
    match = _LAYER.match(name)
    if not match:
        return name
    layer = chunk.decoder.layers[int(match[1])]
    number, rest = layer.layer_number - 1, name[match.end() :]
    expert = _EXPERT.match(rest)
    if expert:
        rest = f"mlp.experts.{expert[2]}{layer.mlp.local_expert_indices[int(expert[1])]}"
    for ours, theirs in checkpoint_names(chunk.arch, number).items():
        if rest.startswith(ours):
            rest = theirs + rest[len(ours) :]
    return f"decoder.layers.{number}.{rest}"


def global_parameters(chunks: Iterable[GPTModel]) -> dict[str, torch.Tensor]:
    """Every parameter of this rank's chunks by its name in the whole model, adapters included.

    And the routers' biases, which are weights of the model though nothing trains them.
    """
    found: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        found |= {global_name(name, chunk): parameter for name, parameter in chunk.named_parameters()}
        for name, buffer in chunk.named_buffers():
            if name.endswith("router.expert_bias"):
                found[global_name(name, chunk)] = buffer
    return found
