"""AdapterPlan: every adapter of a model with its rank and alpha, whatever it came from."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Mapping, Optional

from primus_bridge.config.arguments import PeftArguments
from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.errors import ConfigError
from primus_bridge.peft.targets import Linear, adapted_parts, linears, shortest_names


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter: over a part of the linear of a layer (from 0)."""

    linear: Linear
    layer: int
    part: str
    rank: int
    alpha: float

    @property
    def megatron(self) -> str:
        """decoder.layers.3.self_attention.linear_qkv"""
        return self.linear.megatron.format(layer=self.layer)

    @property
    def modules(self) -> list[str]:
        """The Hugging Face modules it is an adapter of."""
        return [module.format(layer=self.layer) for module in self.linear.covers(self.part)]


@dataclass(frozen=True)
class AdapterPlan:
    """The adapters of a model. scaling: alpha / rank, or alpha / sqrt(rank) with use_rslora (Kalajdzievski 2023)."""

    family: Family
    arch: Architecture
    adapters: tuple[AdapterSpec, ...]
    use_rslora: bool = False
    use_dora: bool = False

    @classmethod
    def of_arguments(cls, lora: PeftArguments, family: Family, arch: Architecture) -> AdapterPlan:
        """The same adapters in every layer. Raises ConfigError for a target module that the model lacks."""
        adapters = tuple(
            AdapterSpec(linear, layer, part, lora.dim, lora.alpha)
            for linear, parts in adapted_parts(lora.target_modules, family, arch).items()
            for layer in linear.layers(arch)
            for part in parts
        )
        return cls(family, arch, adapters, lora.use_rslora, lora.use_dora)

    @classmethod
    def of_modules(
        cls, modules: Mapping[str, tuple[int, float]], lora: PeftArguments, family: Family, arch: Architecture
    ) -> AdapterPlan:
        """Hugging Face module -> (rank, alpha), of an adapter that was trained elsewhere.

        Raises ConfigError for a module that the model lacks or that can have no adapter.
        """
        places = {
            module.format(layer=layer): (linear, layer, part)
            for linear in linears(family, arch)
            for layer in linear.layers(arch)
            for part, module in linear.modules.items()
        }
        unknown = [module for module in modules if module not in places]
        if unknown:
            raise ConfigError(f"no such linear in the model: {', '.join(unknown[:5])}")
        adapters = tuple(AdapterSpec(*place, *modules[name]) for name, place in places.items() if name in modules)
        return cls(family, arch, adapters, lora.use_rslora, lora.use_dora)

    def scaling(self, adapter: AdapterSpec) -> float:
        return adapter.alpha / (math.sqrt(adapter.rank) if self.use_rslora else adapter.rank)

    def by_linear(self) -> dict[str, list[AdapterSpec]]:
        """Name of a linear in the whole model -> its adapters."""
        found: dict[str, list[AdapterSpec]] = {}
        for adapter in self.adapters:
            found.setdefault(adapter.megatron, []).append(adapter)
        return found

    def alike(self, linear: Linear) -> bool:
        """Whether all layers of the model have this linear, with the same adapters: their weights stack."""
        shapes: dict[int, list[tuple[str, int]]] = {layer: [] for layer in range(self.arch.num_layers)}
        for adapter in self.adapters:
            if adapter.linear is linear:
                shapes[adapter.layer].append((adapter.part, adapter.rank))
        return len({tuple(shape) for shape in shapes.values()}) == 1

    @property
    def modules(self) -> dict[str, tuple[int, float]]:
        """Hugging Face module -> (rank, alpha)."""
        return {module: (adapter.rank, adapter.alpha) for adapter in self.adapters for module in adapter.modules}

    @property
    def usual(self) -> tuple[int, float]:
        """The commonest (rank, alpha)."""
        return Counter((adapter.rank, adapter.alpha) for adapter in self.adapters).most_common(1)[0][0]

    @property
    def target_modules(self) -> list[str]:
        """Names for PEFT that mean these modules and no other: ends of names, or all of them in full."""
        names = None
        if all(adapters_everywhere(self, linear) for linear in {adapter.linear for adapter in self.adapters}):
            templates = {module for a in self.adapters for module in a.linear.covers(a.part)}
            names = shortest_names(sorted(templates), self.family, self.arch)
        return list(self.modules) if names is None else names

    @property
    def fan_in_fan_out(self) -> bool:
        return any(adapter.linear.transposed for adapter in self.adapters)


def adapters_everywhere(plan: AdapterPlan, linear: Linear) -> bool:
    """Whether each layer that has the linear has the same parts of it adapted."""
    parts: dict[int, set[str]] = {layer: set() for layer in linear.layers(plan.arch)}
    for adapter in plan.adapters:
        if adapter.linear is linear:
            parts[adapter.layer].add(adapter.part)
    return len({frozenset(found) for found in parts.values()}) == 1


def adapter_plan(lora: PeftArguments, model: HFModel, imported: Optional[Mapping] = None) -> AdapterPlan:
    """The adapters of a run. imported: the manifest's record of an adapter that was trained elsewhere."""
    if imported is None:
        return AdapterPlan.of_arguments(lora, model.family, model.architecture)
    modules = {module: (rank, alpha) for module, (rank, alpha) in imported["modules"].items()}
    return AdapterPlan.of_modules(modules, lora, model.family, model.architecture)


def describe(lora: PeftArguments) -> str:
    """LoRA rank 16, alpha 32 on q_proj, v_proj"""
    kind = ("rs" if lora.use_rslora else "") + ("DoRA" if lora.use_dora else "LoRA")
    return f"{kind} rank {lora.dim}, alpha {lora.alpha:g} on {', '.join(lora.target_modules)}"
