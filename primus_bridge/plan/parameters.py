"""Parameters of a rank: read off the family's rule table, with the adapters of a LoRA plan; nothing is built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.rules import VOCAB, Copy, FusedQKV, GatedMLP, Rule
from primus_bridge.peft.plan import AdapterPlan, AdapterSpec
from primus_bridge.peft.targets import WHOLE
from primus_bridge.plan.layout import Chunk, Layout

EMBEDDING = "embedding."
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Parameters:
    """``count`` tensors alike, of one rank.

    expert: of routed experts that are split over ranks, whose gradients and optimizer states have buffers of their own.
    alone: shared by the first and the last stage, so that Megatron gives it a bucket of its own.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool
    count: int = 1
    expert: bool = False
    alone: bool = False

    @property
    def size(self) -> int:
        """Numbers of one of them."""
        return math.prod(self.shape)

    @property
    def total(self) -> int:
        return self.size * self.count


def local_shape(rule: Rule, arch: Architecture, layout: Layout, vocab_divisible_by: int) -> tuple[int, ...]:
    """Shape of a rule's parameter on one tensor-parallel rank."""
    ranks = layout.expert_tensor if rule.per_expert else layout.tensor
    if isinstance(rule, FusedQKV):
        return (arch.qkv_size // ranks, *(() if rule.bias else (arch.size(rule.inner),)))
    if isinstance(rule, GatedMLP):
        return (2 * arch.size(rule.size) // ranks, *(() if rule.bias else (arch.size(rule.inner),)))
    assert isinstance(rule, Copy)
    shape = [arch.size(name) for name in rule.shape]
    if rule.split == VOCAB:
        shape[0] = arch.padded_vocab_size(vocab_divisible_by, layout.tensor) // ranks
    elif rule.split is not None:
        assert isinstance(rule.split, int)
        shape[rule.split] //= ranks
    return tuple(shape)


def chunk_parameters(
    chunk: Chunk,
    layout: Layout,
    family: Family,
    arch: Architecture,
    vocab_divisible_by: int,
    adapters: Optional[AdapterPlan] = None,
) -> list[Parameters]:
    """Every parameter tensor of a chunk on one rank, and with ``adapters`` theirs: the others are then frozen."""
    full = adapters is None
    wanted = {} if adapters is None else adapters.by_linear()
    found: list[Parameters] = []
    for rule in family.rules:
        # a bias on the choice of experts is a buffer, not a parameter
        if rule.keep_fp32:
            continue
        shape = local_shape(rule, arch, layout, vocab_divisible_by)
        if "{layer}" not in rule.megatron:
            found += _outside_layers(rule, shape, chunk, layout, arch, full)
            continue
        count = arch.moe.num_experts // layout.expert if rule.per_expert and arch.moe is not None else 1
        for layer in chunk.layers:
            if not rule.when(arch, layer):
                continue
            name = rule.megatron.format(layer=layer, expert="*")
            found.append(Parameters(name, shape, full, count, expert=rule.per_expert and layout.expert > 1))
            for spec in wanted.get(name.removesuffix(".weight"), ()):
                assert adapters is not None
                found += adapter_parameters(spec, shape, arch, layout, adapters.use_dora)
    return found


def _outside_layers(
    rule: Rule, shape: tuple[int, ...], chunk: Chunk, layout: Layout, arch: Architecture, full: bool
) -> Iterator[Parameters]:
    if not rule.when(arch, 0):
        return
    words = rule.megatron == WORD_EMBEDDINGS
    # tied embeddings of several stages: the last one has a copy for its output layer
    shared = words and arch.tied_embeddings and layout.pipeline > 1
    there = chunk.embedding if rule.megatron.startswith(EMBEDDING) else chunk.output
    if there or (shared and chunk.output):
        yield Parameters(rule.megatron, shape, full, alone=shared)


def adapter_parameters(
    spec: AdapterSpec, base: tuple[int, ...], arch: Architecture, layout: Layout, use_dora: bool
) -> list[Parameters]:
    """The tensors of one adapter on a rank. base: the local shape of the linear's weight, [out, in]."""
    if spec.part == WHOLE:
        rows = base[0]
    else:
        rows = spec.linear.size(spec.part, arch)
        # ranks that share a group of q, k and v each keep the whole of their adapters
        shares_groups = isinstance(spec.linear.rule, FusedQKV) and arch.num_query_groups % layout.tensor != 0
        rows = rows if shares_groups else rows // layout.tensor
    name = f"{spec.megatron}.adapter.{spec.part}."
    found = [
        Parameters(name + "linear_in.weight", (spec.rank, base[1]), True),
        Parameters(name + "linear_out.weight", (rows, spec.rank), True),
    ]
    if use_dora:
        found.append(Parameters(name + "weight_magnitude", (rows,), True))
    return found


def rule_numbers(rule: Rule, arch: Architecture, active_only: bool = False) -> int:
    """Numbers of the whole model that a rule holds. active_only: of the experts those that work on one token."""
    layers = range(arch.num_layers) if "{layer}" in rule.megatron else range(1)
    return sum(numbers_of_layer(rule, arch, layer, active_only) for layer in layers)


def numbers_of_layer(rule: Rule, arch: Architecture, layer: int, active_only: bool = False) -> int:
    """``rule_numbers`` of one layer; a rule outside the layers has all of its at 0."""
    if rule.keep_fp32 or not rule.when(arch, layer):
        return 0
    copies = 1
    if rule.per_expert:
        assert arch.moe is not None
        copies = arch.moe.top_k if active_only else arch.moe.num_experts
    return copies * sum(math.prod(shape) for shape in rule.hf_tensors(arch).values())


def whole_model(family: Family, arch: Architecture, active_only: bool = False) -> int:
    """Parameters of the Hugging Face model."""
    return sum(rule_numbers(rule, arch, active_only) for rule in family.rules)


def numbers(parameters: Sequence[Parameters], trainable_only: bool = False) -> int:
    """How many numbers they are."""
    return sum(each.total for each in parameters if each.trainable or not trainable_only)
