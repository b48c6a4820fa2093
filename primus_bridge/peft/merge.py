"""The merged model: base parameters by their names in the whole model, adapters added as each is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from primus_bridge.megatron.names import global_name
from primus_bridge.peft.lora import LoRALinear


class MergedParameters(Mapping[str, torch.Tensor]):
    """Name -> base weight plus its adapters; one tensor is made at a time, and the model stays as it is."""

    def __init__(self, chunks: list):
        self._parameters: dict[str, torch.Tensor] = {}
        self._wrapped: dict[str, LoRALinear] = {}
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if ".adapter." not in name:
                    self._parameters[global_name(name, chunk)] = parameter
            for name, module in chunk.named_modules():
                if isinstance(module, LoRALinear):
                    self._wrapped[global_name(f"{name}.weight", chunk)] = module

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._wrapped:
            return self._wrapped[name].merged_weight()
        return self._parameters[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
