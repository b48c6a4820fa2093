"""Conversion rules of adapters, made from those of the linears they are beside: PEFT in and out at any layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

from primus_bridge.conversion.families import Family
from primus_bridge.conversion.rules import Copy, FusedQKV, GatedMLP, Piece, Rule, Shape
from primus_bridge.peft.plan import AdapterPlan
from primus_bridge.peft.targets import WHOLE, Linear

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class Repeated(Rule):
    """One whole tensor that Hugging Face has under several names: A of an adapter over fused projections."""

    hf: tuple[str, ...] = ()
    shape: Shape = ()

    def hf_tensors(self, arch):
        return dict.fromkeys(self.hf, tuple(arch.size(name) for name in self.shape))

    def pieces(self, parameter, arch, shard):
        for name in self.hf:
            yield Piece(name, parameter, owned=shard.rank == 0)


def adapter_family(plan: AdapterPlan, tensor_parallel: int) -> Family:
    """The plan's adapters as a family of tensors: loaded and written by what loads and writes a model.

    Names are those of a PEFT file without its ``base_model.model.``.
    """
    layers: dict[tuple[Linear, str, int], set[int]] = {}
    for adapter in plan.adapters:
        layers.setdefault((adapter.linear, adapter.part, adapter.rank), set()).add(adapter.layer)
    rules: list[Rule] = []
    for (linear, part, rank), where in layers.items():
        rules += _rules(linear, part, rank, frozenset(where), plan, tensor_parallel)
    return replace(plan.family, rules=tuple(rules))


def _rules(linear: Linear, part: str, rank: int, layers: frozenset[int], plan: AdapterPlan, tensor_parallel: int):
    adapter = linear.megatron + (".adapter." if part == WHOLE else f".adapter.adapter_{part}.")
    names = linear.covers(part)

    def when(arch, layer):
        return layer in layers

    into = adapter + "linear_in.weight"
    inner = (rank, _inputs(linear))
    if len(names) == 1:
        yield Copy(into, names[0] + LORA_A, shape=inner, split=1 if linear.split == 1 else None, when=when)
    else:
        yield Repeated(into, tuple(name + LORA_A for name in names), shape=inner, when=when)
    if part == WHOLE:
        yield _outputs(linear, adapter + "linear_out.weight", LORA_B, rank, when)
        if plan.use_dora:
            yield _outputs(linear, adapter + "weight_magnitude", MAGNITUDE, None, when)
        return
    # ranks that share a group of q, k and v hold adapters of q, k, v whole (LoRALinear.shares_groups)
    shares = isinstance(linear.rule, FusedQKV) and plan.arch.num_query_groups % tensor_parallel != 0
    split = None if shares else 0
    rows = linear.size(part, plan.arch)
    yield Copy(adapter + "linear_out.weight", names[0] + LORA_B, shape=(rows, rank), split=split, when=when)
    if plan.use_dora:
        yield Copy(adapter + "weight_magnitude", names[0] + MAGNITUDE, shape=(rows,), split=split, when=when)


def _inputs(linear: Linear) -> str | int:
    rule = linear.rule
    if isinstance(rule, (FusedQKV, GatedMLP)):
        return rule.inner
    assert isinstance(rule, Copy)
    return rule.shape[1]


def _outputs(linear: Linear, megatron: str, suffix: str, rank: Optional[int], when) -> Rule:
    """The rule of [out, rank], or with rank None of [out], in the row order of the linear's weight."""
    rule = linear.rule

    def named(weight: str) -> str:
        return weight and weight.removesuffix(".weight") + suffix

    if isinstance(rule, Copy):
        shape = (rule.shape[0],) if rank is None else (rule.shape[0], rank)
        return Copy(megatron, named(rule.hf), shape=shape, split=0 if rule.split == 0 else None, when=when)
    assert isinstance(rule, (FusedQKV, GatedMLP))
    same: dict = dict(megatron=megatron, packed=named(rule.packed), bias=rank is None, inner=rank or 0, when=when)
    if isinstance(rule, FusedQKV):
        return replace(rule, q=named(rule.q), k=named(rule.k), v=named(rule.v), transposed=False, **same)
    return replace(rule, gate=named(rule.gate), up=named(rule.up), **same)
