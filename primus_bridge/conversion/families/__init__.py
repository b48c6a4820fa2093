"""Model families: for each a rule table and a config mapping; found by config.json's ``model_type``."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any, Callable, Sequence

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.rules import Rule
from primus_bridge.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Family:
    """name: for people; rules: weights both ways; architecture: config.json -> Architecture.

    optional_prefix: of the tensors' names, which some releases leave out ("transformer."). ignored: tensors of a
    released model that this decoder does not have, as (name, architecture) -> whether it is one.
    """

    name: str
    model_type: str
    rules: Sequence[Rule]
    architecture: Callable[[dict[str, Any]], Architecture]
    optional_prefix: str = ""
    ignored: Callable[[str, Architecture], bool] = lambda name, arch: False

    def ignores(self, name: str, arch: Architecture) -> bool:
        return self.tied_output(name, arch) or self.ignored(name, arch)

    @staticmethod
    def tied_output(name: str, arch: Architecture) -> bool:
        """Whether a tensor is the output layer of a model that has it from its embeddings."""
        return arch.tied_embeddings and name in ("lm_head.weight", "embed_out.weight")


@cache
def families() -> dict[str, Family]:
    """model_type -> Family, of every supported one: FAMILIES of each file beside this one."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for family in getattr(loaded, "FAMILIES", ()):
            found[family.model_type] = family
    return found


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json. Raises ConfigError that lists the supported ones."""
    known = families()
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(
            f"unsupported architecture: model_type {model_type!r}; supported: {', '.join(sorted(known))}"
            + did_you_mean(str(model_type), known),
            where=where,
        )
    return known[model_type]


@dataclass(frozen=True)
class Supported:
    """What a model_type supports, as ``primus convert --list`` prints it. layouts: kinds of parallelism."""

    model_type: str
    models: str
    layouts: str
    adapters: str


def supported_model_types() -> list[Supported]:
    """Every supported model_type, in alphabetical order."""
    from primus_bridge.peft.targets import module_names

    return [
        Supported(
            model_type,
            family.name,
            "TP PP SP CP DP" + (" EP" if any(rule.per_expert for rule in family.rules) else ""),
            " ".join(module_names(family)),
        )
        for model_type, family in sorted(families().items())
    ]
