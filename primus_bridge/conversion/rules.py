"""Conversion rules: how a Megatron parameter and its Hugging Face tensors hold the same numbers.

A rule is written once and read in both directions. It is shard-aware: loading reads only the bytes of this
tensor-parallel rank, exporting joins the shards of all ranks. Shapes name dimensions of Architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Callable, Iterator, Optional, Protocol, Sequence

import torch

from primus_bridge.conversion.architecture import Architecture

Shape = tuple[str, ...]
VOCAB = "vocab"


class TensorReader(Protocol):
    """Where Hugging Face tensors come from: a folder of safetensors, or seeded random numbers."""

    def read(self, name: str, rows: Optional[slice] = None, columns: Optional[slice] = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Shard:
    """The part of every split tensor that tensor-parallel rank ``rank`` of ``size`` holds."""

    rank: int
    size: int

    def of(self, length: int) -> slice:
        assert length % self.size == 0, f"{length} is not divisible by {self.size} tensor-parallel ranks"
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True)
class Rule(ABC):
    """megatron: parameter name with {layer}; ``when`` says whether an architecture has it."""

    megatron: str
    when: Callable[[Architecture], bool] = field(default=lambda arch: True, kw_only=True)

    @abstractmethod
    def hf_tensors(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Hugging Face name template -> shape of the whole tensor."""

    @abstractmethod
    def load(self, reader: TensorReader, layer: Optional[int], arch: Architecture, shard: Shard, rows: int):
        """This rank's parameter, from the tensors of ``layer``; ``rows`` is the parameter's first dimension."""

    @abstractmethod
    def export(self, shards: Sequence[torch.Tensor], arch: Architecture) -> dict[str, torch.Tensor]:
        """Name template -> whole tensor, from the parameter's shards in tensor-parallel order."""


def _dims(shape: Shape, arch: Architecture) -> tuple[int, ...]:
    return tuple(arch.size(name) for name in shape)


@dataclass(frozen=True)
class Copy(Rule):
    """One tensor, whole or split along dimension 0 or 1; VOCAB: rows split and padded with zeros."""

    hf: str = ""
    shape: Shape = ()
    split: int | str | None = None

    def hf_tensors(self, arch):
        return {self.hf: _dims(self.shape, arch)}

    def load(self, reader, layer, arch, shard, rows):
        name = self.hf.format(layer=layer)
        lengths = _dims(self.shape, arch)
        if self.split is None:
            return reader.read(name)
        if self.split == 1:
            return reader.read(name, columns=shard.of(lengths[1]))
        if self.split == 0:
            return reader.read(name, rows=shard.of(lengths[0]))
        start, stop = shard.rank * rows, min((shard.rank + 1) * rows, lengths[0])
        real = reader.read(name, rows=slice(min(start, stop), stop))
        padding = real.new_zeros((rows - real.shape[0], *lengths[1:]))
        return torch.cat((real, padding)) if len(padding) else real

    def export(self, shards, arch):
        if self.split is None:
            return {self.hf: shards[0]}
        whole = torch.cat(list(shards), dim=1 if self.split == 1 else 0) if len(shards) > 1 else shards[0]
        return {self.hf: whole[: arch.vocab_size] if self.split == VOCAB else whole}


def split_qkv(shards: Sequence[torch.Tensor], arch: Architecture) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole q, k and v from the shards of a parameter that holds each group's rows together; any trailing shape."""
    whole = torch.cat(list(shards)) if len(shards) > 1 else shards[0]
    per_group = arch.num_attention_heads // arch.num_query_groups
    whole = whole.view(arch.num_query_groups, per_group + 2, arch.kv_channels, *whole.shape[1:])
    q, k, v = (part.flatten(0, 2) for part in whole.split((per_group, 1, 1), dim=1))
    return q, k, v


def split_gate_up(shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole gate and up from the shards of a parameter of which each is [its gate rows; its up rows]."""
    halves = [shard.chunk(2) for shard in shards]
    return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


@dataclass(frozen=True)
class FusedQKV(Rule):
    """q, k, v in one parameter, per KV group ``[q of the group..., k, v]``; weights or biases.

    Megatron splits by groups, so a rank's q rows are one block of the HF tensor, and so are its k and v rows.
    """

    q: str = ""
    k: str = ""
    v: str = ""
    bias: bool = False

    def hf_tensors(self, arch):
        inner = () if self.bias else (arch.hidden_size,)
        return {self.q: (arch.q_size, *inner), self.k: (arch.kv_size, *inner), self.v: (arch.kv_size, *inner)}

    def load(self, reader, layer, arch, shard, rows):
        parts = []
        for name, length in ((self.q, arch.q_size), (self.k, arch.kv_size), (self.v, arch.kv_size)):
            tensor = reader.read(name.format(layer=layer), rows=shard.of(length))
            parts.append(tensor.view(arch.num_query_groups // shard.size, -1, arch.kv_channels, *tensor.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 2)

    def export(self, shards, arch):
        return dict(zip((self.q, self.k, self.v), split_qkv(shards, arch), strict=True))


@dataclass(frozen=True)
class GatedMLP(Rule):
    """gate and up in one parameter; each rank holds ``[its part of gate; its part of up]``."""

    gate: str = ""
    up: str = ""

    def hf_tensors(self, arch):
        shape = (arch.ffn_hidden_size, arch.hidden_size)
        return {self.gate: shape, self.up: shape}

    def load(self, reader, layer, arch, shard, rows):
        mine = shard.of(arch.ffn_hidden_size)
        return torch.cat([reader.read(name.format(layer=layer), rows=mine) for name in (self.gate, self.up)])

    def export(self, shards, arch):
        return dict(zip((self.gate, self.up), split_gate_up(shards), strict=True))


@dataclass(frozen=True)
class Placed:
    """A rule at a layer (None outside the layers): one Megatron parameter and its Hugging Face tensors."""

    rule: Rule
    layer: Optional[int]

    @property
    def megatron(self) -> str:
        return self.rule.megatron.format(layer=self.layer)

    def hf_tensors(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        return {name.format(layer=self.layer): shape for name, shape in self.rule.hf_tensors(arch).items()}


def placed_rules(rules: Sequence[Rule], arch: Architecture) -> Iterator[Placed]:
    """Every parameter of the whole model, in the order of its layers; rules that ``arch`` lacks are left out."""
    rules = [rule for rule in rules if rule.when(arch)]
    inside = [rule for rule in rules if "{layer}" in rule.megatron]
    first = rules.index(inside[0])
    yield from (Placed(rule, None) for rule in rules[:first] if rule not in inside)
    for layer in range(arch.num_layers):
        yield from (Placed(rule, layer) for rule in inside)
    yield from (Placed(rule, None) for rule in rules[first:] if rule not in inside)


def expected_hf_tensors(rules: Sequence[Rule], arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the whole model with its shape, in file order."""
    return {name: shape for placed in placed_rules(rules, arch) for name, shape in placed.hf_tensors(arch).items()}
