"""The merged model: base parameters by their names in the whole model, adapters added as each is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Optional

import torch

from primus_bridge.megatron.names import global_name, global_parameters
from primus_bridge.peft.lora import LoRALinear


class MergedParameters(Mapping[str, torch.Tensor]):
    """Name -> base weight plus its adapters; one tensor is made at a time, and the model stays as it is.

    Making it is collective (DoRA's factors are of whole rows); what comes after is this rank's own.
    """

    def __init__(self, chunks: list):
        parameters = global_parameters(chunks)
        self._parameters = {name: value for name, value in parameters.items() if ".adapter." not in name}
        self._wrapped: dict[str, tuple[LoRALinear, Optional[torch.Tensor]]] = {}
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, LoRALinear):
                    self._wrapped[global_name(f"{name}.weight", chunk)] = module, module.row_scale()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._wrapped:
            module, row_scale = self._wrapped[name]
            return module.merged_weight(row_scale)
        return self._parameters[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
