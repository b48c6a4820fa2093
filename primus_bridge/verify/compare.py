"""How far two computations of the same numbers lie apart: each rank compares what it holds, and all hear the worst."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Mapping, Optional

import torch
import torch.distributed as dist

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.load import held_names
from primus_bridge.conversion.rules import Placed, Shards, TensorReader, placed_rules
from primus_bridge.verify.reference import ACTIVATIONS, summary

NEGLIGIBLE = 1e-4
"""A gradient under this share of the largest of all is measured by that share of it: what cancels to nothing, as the
gradient of GPT-2's key biases does, is rounding on both sides."""


@dataclass(frozen=True)
class Difference:
    """absolute: max |ours - reference|, infinite where one is no number; reference: max |reference|.

    share: of an activation's tokens, how many lie beyond the tolerance (on the rank that has most); else None.
    """

    absolute: float = 0.0
    reference: float = 0.0
    share: Optional[float] = None

    @classmethod
    def of(cls, ours: torch.Tensor, reference: torch.Tensor) -> Difference:
        """Of two tensors of one shape, compared in fp32."""
        assert ours.shape == reference.shape, (ours.shape, reference.shape)
        if not reference.numel():
            return cls()
        reference = reference.float()
        absolute = (ours.detach().float().cpu() - reference).abs().max().item()
        size = reference.abs().max().item()
        return cls(absolute if math.isfinite(absolute) else math.inf, size if math.isfinite(size) else math.inf)

    def worse(self, other: Optional[Difference]) -> Difference:
        if other is None:
            return self
        return Difference(
            max(self.absolute, other.absolute),
            max(self.reference, other.reference),
            self.share if other.share is None else max(self.share or 0.0, other.share),
        )

    def relative(self, floor: float = 0.0) -> float:
        """To the reference's largest number, or to ``floor`` where that is larger."""
        if self.absolute == 0.0:
            return 0.0
        size = max(self.reference, floor)
        return self.absolute / size if 0 < size < math.inf else math.inf


Differences = dict[str, Difference]


class ActivationComparer:
    """A Watcher (megatron/trace.py) that compares each part it is shown with the recorded one."""

    def __init__(self, folder: Path, tolerance: float):
        from safetensors import safe_open

        self.largest: dict[str, float] = summary(folder)["largest"]
        self.tolerance = tolerance
        self.recorded = safe_open(folder / ACTIVATIONS, framework="pt")
        self.differences: Differences = {}

    def __call__(self, stage: str, part: Any) -> None:
        if stage not in self.largest:
            return
        reference = self.recorded.get_slice(stage)[part.rows, part.positions, part.columns]
        difference = Difference.of(part.values, reference)
        close = (part.values - reference).abs().amax(-1) <= self.tolerance * self.largest[stage]
        difference = replace(difference, share=1 - close.float().mean().item())
        self.differences[stage] = difference.worse(self.differences.get(stage))


def compare_tensors(
    ours: Mapping[str, torch.Tensor], reader: TensorReader, family: Family, arch: Architecture, shards: Shards
) -> Differences:
    """This rank's tensors (by their names in Megatron's whole model) with those of ``reader``, by Hugging Face names.

    Copies that several ranks hold are all compared: a gradient that one of them failed to sum shows.
    """
    found: Differences = {}
    for placed in placed_rules(family.rules, arch):
        for name in held_names(placed.megatron, ours, arch):
            for piece in placed.pieces(ours[name].detach(), arch, shards):
                reference = reader.read(piece.name, piece.rows, piece.columns).view(piece.view.shape)
                found[piece.name] = Difference.of(piece.view, reference).worse(found.get(piece.name))
    return found


def over_ranks(differences: Differences) -> Differences:
    """The worst of every rank's, the same on all. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, differences)
    merged: Differences = {}
    for part in gathered:
        for name, difference in part.items():
            merged[name] = difference.worse(merged.get(name))
    return merged


@dataclass(frozen=True)
class Place:
    """Where a tensor works. stage: "embedding", "layer 3", "final norm", "logits"; part: "attention", "mlp", None."""

    stage: str
    part: Optional[str] = None


def tensor_places(family: Family, arch: Architecture) -> dict[str, Place]:
    """Hugging Face name -> its place, in the order in which the model computes."""
    return {name: _place(placed) for placed in placed_rules(family.rules, arch) for name in placed.hf_tensors(arch)}


def _place(placed: Placed) -> Place:
    name = placed.megatron
    if placed.layer is None:
        for start, stage in (("embedding.", "embedding"), ("decoder.final_layernorm.", "final norm")):
            if name.startswith(start):
                return Place(stage)
        return Place("logits")
    stage = f"layer {placed.layer}"
    if ".post_layernorm." in name:
        return Place(stage)  # after attention or MLP: their own outputs do not show it
    attention = ".self_attention." in name or ".input_layernorm." in name
    return Place(stage, "attention" if attention else "mlp")
