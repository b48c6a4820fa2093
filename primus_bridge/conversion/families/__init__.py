"""Model families: for each a rule table and a config mapping; found by config.json's ``model_type``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.rules import Rule
from primus_bridge.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Family:
    """name: for people; rules: weights both ways; architecture: config.json -> Architecture."""

    name: str
    model_type: str
    rules: Sequence[Rule]
    architecture: Callable[[dict[str, Any]], Architecture]


def families() -> dict[str, Family]:
    """model_type -> Family, of every supported one."""
    from primus_bridge.conversion.families import llama, qwen2, qwen3

    return {module.FAMILY.model_type: module.FAMILY for module in (llama, qwen2, qwen3)}


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


def supported_model_types() -> list[str]:
    """A line a supported model_type: the type and the models it stands for."""
    return [f"{model_type:<8} {family.name}" for model_type, family in sorted(families().items())]
