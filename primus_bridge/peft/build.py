"""Adapters onto a model's chunks: the base frozen, the linears of a plan wrapped, their weights at their start."""

from __future__ import annotations

import hashlib
import math
from typing import Optional

import torch

from primus_bridge.config.arguments import PeftArguments
from primus_bridge.megatron.names import global_name, global_parameters
from primus_bridge.peft.lora import LoRALinear
from primus_bridge.peft.plan import AdapterPlan, describe


class LoRA:
    """The adapters of a model's chunks on this rank."""

    def __init__(self, arguments: PeftArguments, plan: AdapterPlan, trainable: int, total: int):
        self.arguments, self.plan = arguments, plan
        self.trainable, self.total = trainable, total

    def describe(self) -> str:
        """``LoRA rank 16, alpha 32 on q_proj, v_proj (1,234 trainable parameters, 0.5 %)``; of this rank's part."""
        return (
            f"{describe(self.arguments)} "
            f"({self.trainable:,} trainable parameters a rank, {100 * self.trainable / self.total:.2f} %)"
        )


def add_lora(chunks: list, arguments: PeftArguments, plan: AdapterPlan, seed: Optional[int]) -> LoRA:
    """Freeze every weight of the chunks and put the plan's adapters beside their linears. Collective with DoRA.

    linear_in starts uniform in +-1/sqrt(in) (as PEFT), or normal with variance 2/(in + rank) (lora_A_init_method
    xavier), seeded by (seed, name) so that every layout starts alike; linear_out starts at zero, DoRA's magnitudes at
    the lengths of the base's rows. seed None: all weights are about to be loaded. Call it after the base weights are
    loaded.
    """
    wanted = plan.by_linear()
    for chunk in chunks:
        chunk.requires_grad_(False)
        tp = chunk.pg_collection.tp
        bases = {global_name(f"{name}.weight", chunk): name for name, _ in chunk.named_modules()}
        for megatron, specs in wanted.items():
            name = bases.get(f"{megatron}.weight")
            if name is not None:
                owner, _, leaf = name.rpartition(".")
                base = chunk.get_submodule(name)
                setattr(chunk.get_submodule(owner), leaf, LoRALinear(base, specs, plan, arguments.dropout, tp))
        if seed is not None:
            for name, parameter in chunk.named_parameters():
                if name.endswith("linear_in.weight"):
                    _initialise(parameter, f"{seed}:{global_name(name, chunk)}", tp, arguments.lora_A_init_method)
            for module in chunk.modules():
                if isinstance(module, LoRALinear) and module.dora:
                    module.start_magnitudes()
        if chunk.config.recompute_granularity == "full" and chunk.pre_process:
            # a recomputed block whose input needs no gradient would give its adapters none
            chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return LoRA(arguments, plan, trainable, sum(p.numel() for p in parameters))


@torch.no_grad()
def _initialise(parameter: torch.nn.Parameter, name: str, tp, method: str) -> None:
    split = getattr(parameter, "tensor_model_parallel", False)
    rows, columns = parameter.shape
    whole = columns * tp.size() if split else columns
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"))
    values = torch.empty(rows, whole)
    if method == "xavier":
        values.normal_(0.0, math.sqrt(2 / (whole + rows)), generator=generator)
    else:
        bound = 1 / math.sqrt(whole)
        values.uniform_(-bound, bound, generator=generator)
    parameter.copy_(values[:, tp.rank() * columns : (tp.rank() + 1) * columns] if split else values)


def adapter_parameters(chunks: list) -> dict[str, torch.Tensor]:
    """This rank's adapter weights by their names in the whole model."""
    return {name: parameter for name, parameter in global_parameters(chunks).items() if ".adapter." in name}
