"""Conversion rules: how a Megatron parameter and its Hugging Face tensors hold the same numbers.

A rule is written once and read in both directions: it pairs views of a rank's parameter with regions of Hugging Face
tensors. Loading copies a region into its view and exporting a view into its region, so a rank reads and writes the
bytes of its own shard only, and nothing is ever gathered. Shapes name dimensions of Architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Callable, Iterator, Optional, Protocol, Sequence

from primus_bridge.conversion.architecture import Architecture

if TYPE_CHECKING:
    import torch

Shape = tuple[str | int, ...]
VOCAB = "vocab"
When = Callable[[Architecture, int], bool]


class TensorReader(Protocol):
    """Where Hugging Face tensors come from: a folder of weights, or seeded random numbers."""

    def read(self, name: str, rows: Optional[slice] = None, columns: Optional[slice] = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Shard:
    """The part of every split tensor that rank ``rank`` of ``size`` tensor-parallel ranks holds."""

    rank: int
    size: int

    def of(self, length: int) -> slice:
        assert length % self.size == 0, f"{length} is not divisible by {self.size} tensor-parallel ranks"
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True)
class Shards:
    """A rank's shard of the dense tensors and of the experts' tensors, which may be split over other ranks."""

    dense: Shard = Shard(0, 1)
    expert: Shard = Shard(0, 1)


@dataclass(frozen=True)
class Piece:
    """Numbers in two places: ``view`` of a parameter, and rows or columns (None: all) of a Hugging Face tensor.

    The region has the view's elements in the view's order, though perhaps fewer dimensions. owned: whether this rank
    writes the region; exactly one of the ranks that hold it does.
    """

    name: str
    view: torch.Tensor
    rows: Optional[slice] = None
    columns: Optional[slice] = None
    owned: bool = True


@dataclass(frozen=True)
class Rule(ABC):
    """megatron: parameter name with {layer} and, of an expert's, {expert}; ``when`` says which layers have it."""

    megatron: str
    when: When = field(default=lambda arch, layer: True, kw_only=True)

    keep_fp32 = False

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron

    @abstractmethod
    def hf_tensors(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Hugging Face name template -> shape of the whole tensor."""

    @abstractmethod
    def pieces(self, parameter: torch.Tensor, arch: Architecture, shard: Shard) -> Iterator[Piece]:
        """How this rank's parameter and the Hugging Face tensors hold the same numbers; names are templates."""


def _dims(shape: Shape, arch: Architecture) -> tuple[int, ...]:
    return tuple(arch.size(name) for name in shape)


@dataclass(frozen=True)
class Copy(Rule):
    """One tensor, whole or split along dimension 0 or 1 of the parameter; VOCAB: rows split and padded.

    shape: of the parameter. transposed: the Hugging Face tensor is [in, out] (GPT-2's Conv1D). keep_fp32: the numbers
    stay in fp32 whatever the model's dtype.
    """

    hf: str = ""
    shape: Shape = ()
    split: int | str | None = None
    transposed: bool = False
    keep_fp32: bool = field(default=False, kw_only=True)

    def hf_tensors(self, arch):
        shape = _dims(self.shape, arch)
        return {self.hf: shape[::-1] if self.transposed else shape}

    def pieces(self, parameter, arch, shard):
        lengths = _dims(self.shape, arch)
        if self.split is None:
            yield _piece(self.hf, parameter, None, 0, self.transposed, owned=shard.rank == 0)
        elif self.split == VOCAB:
            held = parameter.shape[0]
            start = min(shard.rank * held, lengths[0])
            stop = min(start + held, lengths[0])
            yield Piece(self.hf, parameter[: stop - start], rows=slice(start, stop))
        else:
            assert isinstance(self.split, int)
            yield _piece(self.hf, parameter, shard.of(lengths[self.split]), self.split, self.transposed)


def _piece(name, view, part: Optional[slice], dim: int, transposed: bool, owned: bool = True) -> Piece:
    """A piece whose view holds ``part`` of dimension 0 or 1 of the parameter, which has its inputs last."""
    if transposed:
        view, dim = view.movedim(-1, 0), 1 - dim
    return Piece(name, view, rows=part if dim == 0 else None, columns=part if dim == 1 else None, owned=owned)


@dataclass(frozen=True)
class FusedQKV(Rule):
    """q, k, v in one parameter, per KV group ``[q of the group..., k, v]``; weights or biases.

    q, k and v are tensors of their own, or ``packed`` holds them one after the other. Megatron splits by groups, so a
    rank's q rows are one block, and so are its k and v rows; with more ranks than groups, a rank has some of the rows
    of one group. inner: the weight's inputs.
    """

    q: str = ""
    k: str = ""
    v: str = ""
    packed: str = ""
    bias: bool = False
    transposed: bool = False
    inner: str | int = "hidden_size"

    def hf_tensors(self, arch):
        inner = () if self.bias else (arch.size(self.inner),)

        def shape(rows):
            return (*inner, rows) if self.transposed and inner else (rows, *inner)

        if self.packed:
            return {self.packed: shape(arch.qkv_size)}
        return {self.q: shape(arch.q_size), self.k: shape(arch.kv_size), self.v: shape(arch.kv_size)}

    def pieces(self, parameter, arch, shard):
        k_start = arch.q_size if self.packed else 0
        v_start = k_start + arch.kv_size if self.packed else 0
        names = (self.packed,) * 3 if self.packed else (self.q, self.k, self.v)
        transposed = self.transposed and not self.bias
        for part, (view, rows) in enumerate(qkv_views(parameter, arch, shard)):
            start = (0, k_start, v_start)[part]
            rows = slice(rows.start + start, rows.stop + start)
            if rows.start < rows.stop:
                yield _piece(names[part], view, rows, 0, transposed)


def qkv_views(parameter: torch.Tensor, arch: Architecture, shard: Shard) -> Iterator[tuple[torch.Tensor, slice]]:
    """For q, k, v: (the view of their rows in a rank's fused parameter, which rows of the whole q, k or v it is)."""
    per_group, d, groups = arch.num_attention_heads // arch.num_query_groups, arch.kv_channels, arch.num_query_groups
    if groups % shard.size == 0:
        grouped = parameter.view(groups // shard.size, per_group + 2, d, *parameter.shape[1:])
        for length, heads in (
            (arch.q_size, slice(0, per_group)),
            (arch.kv_size, slice(per_group, per_group + 1)),
            (arch.kv_size, slice(per_group + 1, per_group + 2)),
        ):
            yield grouped[:, heads], shard.of(length)
        return
    # several ranks share a group: this rank's rows are cut from [q..., k, v] of one group
    mine = shard.of(arch.qkv_size)
    group, first = divmod(mine.start, (per_group + 2) * d)
    last = first + mine.stop - mine.start
    for rows_before, size in ((0, per_group * d), (per_group * d, d), ((per_group + 1) * d, d)):
        start, stop = (min(max(edge - rows_before, 0), size) for edge in (first, last))
        at = rows_before + start - first
        yield (
            parameter[at : at + stop - start] if start < stop else parameter[:0],
            slice(group * size + start, group * size + stop),
        )


@dataclass(frozen=True)
class GatedMLP(Rule):
    """gate and up in one parameter, weights or biases; each rank holds ``[its part of gate; its part of up]``.

    gate and up are tensors of their own, or ``packed`` holds gate, then up. size: of each;
    inner: the weight's inputs.
    """

    gate: str = ""
    up: str = ""
    packed: str = ""
    size: str = "ffn_hidden_size"
    bias: bool = False
    inner: str | int = "hidden_size"

    def hf_tensors(self, arch):
        size = arch.size(self.size)
        inner = () if self.bias else (arch.size(self.inner),)
        if self.packed:
            return {self.packed: (2 * size, *inner)}
        return {self.gate: (size, *inner), self.up: (size, *inner)}

    def pieces(self, parameter, arch, shard):
        size = arch.size(self.size)
        mine = shard.of(size)
        gate, up = parameter.chunk(2)
        second = size if self.packed else 0
        yield Piece(self.packed or self.gate, gate, rows=mine)
        yield Piece(self.packed or self.up, up, rows=slice(mine.start + second, mine.stop + second))


@dataclass(frozen=True)
class Placed:
    """A rule at a layer (None outside the layers) and expert: one Megatron parameter and its Hugging Face tensors."""

    rule: Rule
    layer: Optional[int]
    expert: Optional[int] = None

    def _named(self, template: str) -> str:
        return template.format(layer=self.layer, expert=self.expert)

    @property
    def megatron(self) -> str:
        return self._named(self.rule.megatron)

    def hf_tensors(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        return {self._named(name): shape for name, shape in self.rule.hf_tensors(arch).items()}

    def pieces(self, parameter: torch.Tensor, arch: Architecture, shards: Shards) -> Iterator[Piece]:
        shard = shards.expert if self.rule.per_expert else shards.dense
        for piece in self.rule.pieces(parameter, arch, shard):
            yield replace(piece, name=self._named(piece.name))


def placed_rules(rules: Sequence[Rule], arch: Architecture) -> Iterator[Placed]:
    """Every parameter of the whole model, in the order of its layers; rules that a layer lacks are left out."""
    inside = [rule for rule in rules if "{layer}" in rule.megatron]
    first = rules.index(inside[0])
    yield from (Placed(rule, None) for rule in rules[:first] if rule not in inside and rule.when(arch, 0))
    for layer in range(arch.num_layers):
        for rule in inside:
            if not rule.when(arch, layer):
                continue
            if not rule.per_expert:
                yield Placed(rule, layer)
                continue
            assert arch.moe is not None
            yield from (Placed(rule, layer, expert) for expert in range(arch.moe.num_experts))
    yield from (Placed(rule, None) for rule in rules[first:] if rule not in inside and rule.when(arch, 0))


def expected_hf_tensors(rules: Sequence[Rule], arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the whole model with its shape, in file order."""
    return {name: shape for placed in placed_rules(rules, arch) for name, shape in placed.hf_tensors(arch).items()}
