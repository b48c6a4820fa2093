"""Hugging Face weights into this rank's shard of the model: checked whole, then read piece by piece."""

from __future__ import annotations

import hashlib
from typing import Iterable, Iterator, Mapping, Optional

import torch

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.hf_weights import HFWeights
from primus_bridge.conversion.rules import (
    VOCAB,
    Copy,
    Piece,
    Placed,
    Shards,
    TensorReader,
    expected_hf_tensors,
    placed_rules,
)
from primus_bridge.errors import ConfigError

# buffers that old exports carry and every implementation computes anew
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias", "attn.bias", "attention.bias")
# what a rank holds of a tensor beside its parameter while it loads: so few that malloc gives the same memory again
BLOCK_BYTES = 16 * 2**20


def check_tensors(weights: HFWeights, family: Family, arch: Architecture) -> list[str]:
    """Compare a folder's tensors with those the architecture must have; returns the ignored ones.

    Raises ConfigError that names missing, unexpected, wrongly shaped and wrongly typed tensors (the first few of each).
    """
    expected = expected_hf_tensors(family.rules, arch)
    ignored = [name for name in weights.tensors if name.endswith(IGNORED_SUFFIXES) and name not in expected]
    ignored += [name for name in weights.tensors if family.ignores(name, arch)]
    missing = [name for name in expected if name not in weights.tensors]
    known = {*expected, *ignored}
    unexpected = [name for name in weights.tensors if name not in known]
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
    for name in ignored:
        if family.tied_output(name, arch):
            _check_tied(weights, name, placed_rules(family.rules, arch))
    return ignored


def _check_tied(weights: HFWeights, name: str, rules: Iterator[Placed]) -> None:
    """Raises ConfigError when a tied output layer holds other numbers than the embeddings, of which one is lost."""
    embedding = next(one.rule.hf for one in rules if isinstance(one.rule, Copy) and one.rule.split == VOCAB)
    shape = weights.tensors[embedding].shape
    same = weights.tensors[name].shape == shape
    step = max(1, BLOCK_BYTES // (shape[1] * weights.tensors[embedding].dtype.itemsize))
    for first in range(0, shape[0] if same else 0, step):
        rows = slice(first, min(first + step, shape[0]))
        same = same and torch.equal(weights.read(name, rows=rows), weights.read(embedding, rows=rows))
    if not same:
        raise ConfigError(
            f"config.json ties the output layer to the embeddings, but {name} is another tensor than {embedding}: "
            "set tie_word_embeddings to false, or remove the tensor",
            where=str(weights.folder),
        )


def folder_dtypes(weights: HFWeights, family: Family, arch: Architecture) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """(the narrowest dtype that holds every tensor of a checked folder, the dtypes of tensors that have another)."""
    found = {
        name: weights.tensors[name].dtype
        for placed in placed_rules(family.rules, arch)
        if not placed.rule.keep_fp32
        for name in placed.hf_tensors(arch)
    }
    widest = next(iter(found.values()))
    for dtype in set(found.values()):
        widest = torch.promote_types(widest, dtype)
    others = {name: dtype for name, dtype in found.items() if dtype != widest}
    for placed in placed_rules(family.rules, arch):
        for name in placed.hf_tensors(arch) if placed.rule.keep_fp32 else ():
            if weights.tensors[name].dtype != torch.float32:
                others[name] = weights.tensors[name].dtype
    return widest, others


class RandomWeights:
    """Seeded normal initial weights as a TensorReader, for training from scratch: equal at every layout."""

    def __init__(self, family: Family, arch: Architecture, seed: int):
        self.shapes = expected_hf_tensors(family.rules, arch)
        self.std = arch.init_std
        self.norm = 0.0 if arch.zero_centered_norm else 1.0
        self.seed = seed
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))  # a tensor is read in blocks, and drawn once

    def read(self, name: str, rows: Optional[slice] = None, columns: Optional[slice] = None) -> torch.Tensor:
        if self._last[0] != name:
            self._last = (name, self._draw(name))
        whole = self._last[1] if rows is None else self._last[1][rows]
        return whole if columns is None else whole[:, columns].contiguous()

    def _draw(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else self.norm)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.empty(shape).normal_(0.0, self.std, generator=generator)


@torch.no_grad()
def load_weights(
    parameters: Mapping[str, torch.Tensor],
    reader: TensorReader,
    family: Family,
    arch: Architecture,
    shards: Shards,
) -> None:
    """Fill this rank's parameters (by their names in a whole model) from ``reader``; each exactly once.

    Only the bytes of this rank's shard are read, at most BLOCK_BYTES of them at a time.
    """
    loaded: set[str] = set()
    for placed in placed_rules(family.rules, arch):
        for name in held_names(placed.megatron, parameters, arch):
            parameter = parameters[name]
            filled = 0
            for piece in placed.pieces(parameter, arch, shards):
                for part in blocks(piece, BLOCK_BYTES):
                    part.view.copy_(reader.read(part.name, part.rows, part.columns).view(part.view.shape))
                    filled += part.view.numel()
            if filled < parameter.numel():
                # the padding of the vocabulary
                parameter[filled // parameter[0].numel() :] = 0
            loaded.add(name)
    left = set(parameters) - loaded
    assert not left, f"no rule fills {sorted(left)}"


def blocks(piece: Piece, limit: int) -> Iterator[Piece]:
    """``piece`` cut along its first dimension into pieces of at most ``limit`` bytes (or one index)."""
    view = piece.view
    if not view.dim() or view.numel() * view.element_size() <= limit:
        if view.numel():
            yield piece
        return
    step = max(1, limit // (view[0].numel() * view.element_size()))
    # an index of the view stands for so many rows of the tensor
    start = piece.rows.start if piece.rows is not None else 0
    rows = (piece.rows.stop - start) // len(view) if piece.rows is not None else 1
    for first in range(0, len(view), step):
        last = min(first + step, len(view))
        part = slice(start + first * rows, start + last * rows)
        yield Piece(piece.name, view[first:last], rows=part, columns=piece.columns, owned=piece.owned)


def held_names(megatron: str, parameters: Mapping[str, torch.Tensor], arch: Architecture) -> Iterable[str]:
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
