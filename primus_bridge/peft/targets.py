"""Which linears of a model can have adapters, and their names: read off the family's rule table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterator, Optional, Sequence

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.rules import Copy, FusedQKV, GatedMLP, Rule
from primus_bridge.errors import ConfigError, did_you_mean

ALL_LINEAR = "all-linear"
WHOLE = "whole"
"""The part of an adapter over a whole Megatron linear."""
_LINEAR = re.compile(r"^decoder\.layers\.\{layer\}\..*linear_\w+\.weight$")


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear in the decoder's layers. rule: of its weight.

    modules: part -> the Hugging Face module (a template with {layer}) that is this part of it: q, k, v or gate, up
    where they are modules of their own, else the one module as WHOLE.
    """

    rule: Rule
    modules: dict[str, str]

    @property
    def megatron(self) -> str:
        """decoder.layers.{layer}.self_attention.linear_qkv"""
        return self.rule.megatron.removesuffix(".weight")

    @property
    def name(self) -> str:
        return self.megatron.rpartition(".")[2]

    @property
    def split(self) -> Optional[int]:
        """Whether tensor-parallel ranks share its outputs (0) or its inputs (1); None: each has the whole of it."""
        if isinstance(self.rule, Copy):
            assert self.rule.split is None or isinstance(self.rule.split, int)
            return self.rule.split
        return 0

    @property
    def transposed(self) -> bool:
        """Hugging Face stores it as [in, out] (GPT-2's Conv1D)."""
        return isinstance(self.rule, (Copy, FusedQKV)) and self.rule.transposed

    def covers(self, part: str) -> list[str]:
        """The Hugging Face modules of an adapter: its own, or all that are fused."""
        return list(self.modules.values()) if part == WHOLE else [self.modules[part]]

    def size(self, part: str, arch: Architecture) -> int:
        """Rows of a part of the whole model's weight."""
        if isinstance(self.rule, GatedMLP):
            return arch.size(self.rule.size)
        return arch.q_size if part == "q" else arch.kv_size

    def layers(self, arch: Architecture) -> list[int]:
        return [layer for layer in range(arch.num_layers) if self.rule.when(arch, layer)]


def linears(family: Family, arch: Architecture) -> list[Linear]:
    """Every linear that can have adapters: all of the decoder's layers but the router and the routed experts'."""
    found = []
    for rule in family.rules:
        if not _LINEAR.match(rule.megatron) or rule.per_expert:
            continue
        linear = Linear(rule, {part: name.removesuffix(".weight") for part, name in _hf_names(rule)})
        if linear.layers(arch):
            found.append(linear)
    return found


def _hf_names(rule: Rule) -> Iterator[tuple[str, str]]:
    if isinstance(rule, FusedQKV) and not rule.packed:
        yield from (("q", rule.q), ("k", rule.k), ("v", rule.v))
    elif isinstance(rule, GatedMLP) and not rule.packed:
        yield from (("gate", rule.gate), ("up", rule.up))
    elif isinstance(rule, (FusedQKV, GatedMLP)):
        yield WHOLE, rule.packed
    else:
        assert isinstance(rule, Copy)
        yield WHOLE, rule.hf


def without_adapters(family: Family, arch: Architecture) -> dict[str, str]:
    """Linears outside ``linears``, as templates of module names -> what they are."""
    kinds = {"output_layer.weight": "the output layer", "embedding.word_embeddings.weight": "the embeddings"}
    found: dict[str, str] = {}
    for rule in family.rules:
        kind = kinds.get(rule.megatron)
        if rule.per_expert:
            kind = "the routed experts"
        elif rule.megatron.endswith("router.weight"):
            kind = "the router"
        if kind is not None:
            found |= {name.removesuffix(".weight"): kind for name in rule.hf_tensors(arch)}
    return found


def adapted_parts(target_modules: Sequence[str], family: Family, arch: Architecture) -> dict[Linear, tuple[str, ...]]:
    """Linear -> the parts that get an adapter each; (WHOLE,) for one adapter over all of it.

    A name is that of a Hugging Face module (q_proj; with more of its path where that is needed: mlp.c_proj), of a
    Megatron linear (linear_qkv: one adapter over q, k and v), or all-linear: every Hugging Face module of ``linears``
    but those that end as the routed experts' do (shared experts; MLPs between them), which peft takes for the experts.
    Raises ConfigError for an unknown name, for the routed experts, and for a linear named both ways.
    """
    every = linears(family, arch)
    parts: dict[Linear, set[str]] = {}
    for name in target_modules:
        if name == ALL_LINEAR:
            hits = [
                (linear, part)
                for linear in every
                for part, module in linear.modules.items()
                if not _ends_as_experts(module, family)
            ]
        else:
            hits = [
                (linear, part) for linear in every for part, module in linear.modules.items() if _names(name, module)
            ]
            hits += [(linear, WHOLE) for linear in every if _names(name, linear.megatron)]
            _refuse_experts(name, [module for linear, part in hits for module in linear.covers(part)], family)
        if not hits:
            raise _unknown(name, every, family, without_adapters(family, arch))
        for linear, part in hits:
            parts.setdefault(linear, set()).add(part)
    for linear, found in parts.items():
        if WHOLE in found and len(found) > 1:
            raise ConfigError(
                f"'{linear.name}' and its projections are both named: keep one", where="lora_target_modules"
            )
    order = [(linear, [part for part in (*linear.modules, WHOLE) if part in parts.get(linear, ())]) for linear in every]
    return {linear: tuple(dict.fromkeys(found)) for linear, found in order if found}


def _names(name: str, module: str) -> bool:
    return module == name or module.endswith("." + name)


def _expert_modules(family: Family) -> list[str]:
    """Modules of the routed experts, by Hugging Face's names and by Megatron's."""
    rules = [rule for rule in family.rules if rule.per_expert]
    names = [name.removesuffix(".weight") for rule in rules for _, name in _hf_names(rule)]
    return names + [rule.megatron.split(".weight")[0] for rule in rules]


def _ends_as_experts(module: str, family: Family) -> bool:
    """Whether its last word is that of a module of the routed experts."""
    return module.rpartition(".")[2] in {expert.rpartition(".")[2] for expert in _expert_modules(family)}


def _short(module: str, family: Family) -> str:
    """A name that is accepted as a target: the last word, with the one before it where the experts share the last."""
    return ".".join(module.split(".")[-2 if _ends_as_experts(module, family) else -1 :])


def left_out(target_modules: Sequence[str], family: Family, arch: Architecture) -> list[str]:
    """What all-linear does not cover though it can have adapters, by names that add it; nothing without all-linear."""
    if ALL_LINEAR not in target_modules:
        return []
    adapted = {linear.megatron: parts for linear, parts in adapted_parts(target_modules, family, arch).items()}
    rest = [
        module
        for linear in linears(family, arch)
        for part, module in linear.modules.items()
        if not {part, WHOLE} & set(adapted.get(linear.megatron, ()))
    ]
    return list(dict.fromkeys(_short(module, family) for module in rest))


def _refuse_experts(name: str, hits: list[str], family: Family) -> None:
    if not any(_names(name, module) for module in _expert_modules(family)):
        return
    others = sorted({_short(module, family) for module in hits})
    mend = f"name {' or '.join(others)}, or" if others else "name others, or"
    raise ConfigError(
        f"target module '{name}' names linears of the routed experts, which get no adapters in this version: {mend} "
        f"{ALL_LINEAR}, which leaves the router, the experts and whatever is named as they are out",
        where="lora_target_modules",
    )


def _unknown(name: str, every: list[Linear], family: Family, outside: dict[str, str]) -> ConfigError:
    what = next((kind for module, kind in outside.items() if _names(name, module)), None)
    if what is not None:
        return ConfigError(
            f"target module '{name}' is {what}, which gets no adapter in this version", where="lora_target_modules"
        )
    modules = [module for linear in every for module in linear.modules.values()]
    modules += [linear.megatron for linear in every]
    known = [*dict.fromkeys(_short(module, family) for module in modules), ALL_LINEAR]
    return ConfigError(
        f"unknown target module '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}",
        where="lora_target_modules",
    )


def shortest_names(modules: Sequence[str], family: Family, arch: Architecture) -> Optional[list[str]]:
    """The shortest ends of module names that name these templates and nothing else, in the order of the table.

    None when there are none: an end that two modules share, of which one has no adapter, and no longer end tells them
    apart.
    """
    all_modules = [module for linear in linears(family, arch) for module in linear.modules.values()]
    others = [module for module in [*all_modules, *without_adapters(family, arch)] if module not in modules]
    names = []
    for module in all_modules:
        if module not in modules:
            continue
        words = module.split("{layer}.")[-1].split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        name = next((end for end in ends if not any(_names(end, other) for other in others)), None)
        if name is None:
            return None
        names.append(name)
    return list(dict.fromkeys(names))


def module_names(family: Family) -> list[str]:
    """Short names of the Hugging Face modules that can have adapters in some model of the family."""
    rules = [rule for rule in family.rules if _LINEAR.match(rule.megatron) and not rule.per_expert]
    names = [_short(name.removesuffix(".weight"), family) for rule in rules for _, name in _hf_names(rule)]
    return list(dict.fromkeys(names))
