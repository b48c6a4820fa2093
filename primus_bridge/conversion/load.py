"""Hugging Face weights into this rank's shard of the model: checked whole, then read slice by slice."""

from __future__ import annotations

import hashlib
from typing import Iterable, Mapping, Optional

import torch

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.hf_folder import HFWeights
from primus_bridge.conversion.rules import Shard, TensorReader, expected_hf_tensors, placed_rules
from primus_bridge.errors import ConfigError

# buffers that old exports carry and every implementation computes anew
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def check_tensors(weights: HFWeights, family: Family, arch: Architecture) -> list[str]:
    """Compare a folder's tensors with those the architecture must have; returns the ignored ones.

    Raises ConfigError that names missing, unexpected, wrongly shaped and wrongly typed tensors (the first few of each).
    """
    expected = expected_hf_tensors(family.rules, arch)
    ignored = [name for name in weights.tensors if name.endswith(IGNORED_SUFFIXES)]
    if arch.tied_embeddings and "lm_head.weight" in weights.tensors:
        # transformers ties it again whatever the file holds
        ignored.append("lm_head.weight")
    missing = [name for name in expected if name not in weights.tensors]
    unexpected = [name for name in weights.tensors if name not in expected and name not in ignored]
    shapes = [
        f"{name} is {list(weights.tensors[name].shape)}, config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if name in weights.tensors and weights.tensors[name].shape != shape
    ]
    dtypes = [
        f"{name} is {weights.tensors[name].dtype}"
        for name in expected
        if name in weights.tensors and not weights.tensors[name].dtype.is_floating_point
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("wrongly shaped tensors", shapes),
            ("tensors of a type that is not floating point", dtypes),
        )
        if names
    ]
    if problems:
        raise ConfigError("; ".join(problems), where=str(weights.folder))
    return ignored


class RandomWeights:
    """Seeded normal initial weights as a TensorReader, for training from scratch: equal at every layout."""

    def __init__(self, family: Family, arch: Architecture, seed: int):
        self.shapes = expected_hf_tensors(family.rules, arch)
        self.std = arch.init_std
        self.seed = seed

    def read(self, name: str, rows: Optional[slice] = None, columns: Optional[slice] = None) -> torch.Tensor:
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            whole = torch.ones(shape)
        elif name.endswith(".bias"):
            whole = torch.zeros(shape)
        else:
            digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            whole = torch.empty(shape).normal_(0.0, self.std, generator=generator)
        if columns is not None:
            return whole[:, columns]
        return whole[rows] if rows is not None else whole


@torch.no_grad()
def load_weights(
    parameters: Mapping[str, torch.nn.Parameter],
    reader: TensorReader,
    family: Family,
    arch: Architecture,
    shard: Shard,
) -> None:
    """Fill this rank's parameters (by their names in a whole model) from ``reader``; each exactly once."""
    loaded: set[str] = set()
    for placed in placed_rules(family.rules, arch):
        for name in _owned(placed.megatron, parameters, arch):
            parameter = parameters[name]
            tensor = placed.rule.load(reader, placed.layer, arch, shard, parameter.shape[0])
            assert tensor.shape == parameter.shape, (name, tensor.shape, parameter.shape)
            parameter.copy_(tensor)
            loaded.add(name)
    left = set(parameters) - loaded
    assert not left, f"no rule fills {sorted(left)}"


def _owned(megatron: str, parameters: Mapping[str, torch.nn.Parameter], arch: Architecture) -> Iterable[str]:
    """The names under which this rank holds a rule's parameter: none, one, or both ends of tied embeddings."""
    if megatron in parameters:
        yield megatron
    if (
        arch.tied_embeddings
        and megatron.startswith("embedding.word_embeddings")
        and "output_layer.weight" in parameters
    ):
        # the last pipeline stage keeps a copy of the tied embedding
        yield "output_layer.weight"
