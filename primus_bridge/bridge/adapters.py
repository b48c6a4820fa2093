"""Which of Megatron-Bridge's adapters mean what the arguments say: LoRA, CanonicalLoRA or DoRA, and their linears."""

from __future__ import annotations

from typing import NamedTuple

from primus_bridge.bridge.fields import refusal
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.peft.targets import WHOLE, adapted_parts

# our part of a fused linear -> the name that CanonicalLoRA has for it
CANONICAL = {
    "q": "linear_q",
    "k": "linear_k",
    "v": "linear_v",
    "gate": "linear_fc1_gate",
    "up": "linear_fc1_up",
}


class Adapters(NamedTuple):
    """kind: the class's name; target_modules: in its own words."""

    kind: str
    target_modules: list[str]


def adapters(arguments: BridgeArguments, model: HFModel) -> Adapters:
    """LoRA has one adapter a Megatron linear, CanonicalLoRA one a Hugging Face projection: the names tell which.

    Raises ConfigError for targets that it has in neither way.
    """
    peft = arguments.peft
    every = adapted_parts(peft.target_modules, model.family, model.architecture)
    fused = {linear.name: set(parts) for linear, parts in every.items() if len(linear.modules) > 1}
    whole = [linear.name for linear, parts in every.items() if WHOLE in parts]
    split = {name: parts for name, parts in fused.items() if WHOLE not in parts}

    def refuse(reason: str):
        return refusal(arguments, "peft.target_modules", reason)

    if split and any(name in fused for name in whole):
        raise refuse("its adapters are either Megatron's linears (linear_qkv) or projections (q_proj); keep one kind")
    for name, parts in split.items():
        missing = set(next(linear for linear in every if linear.name == name).modules) - parts
        if missing:
            raise refuse(
                f"it has adapters on all projections of {name} or on none, and {', '.join(sorted(missing))} is left out"
            )
    if peft.use_dora and split:
        raise refuse(
            "its DoRA is one of Megatron's linears: --lora_target_modules linear_qkv,linear_proj,linear_fc1,linear_fc2"
        )
    if peft.use_dora:
        return Adapters("DoRA", sorted(set(whole)))
    if not split:
        return Adapters("LoRA", sorted(set(whole)))
    names = [CANONICAL[part] for parts in split.values() for part in sorted(parts)]
    return Adapters("CanonicalLoRA", sorted({*whole, *names}))
