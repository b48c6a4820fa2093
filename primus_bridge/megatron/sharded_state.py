"""What Megatron shards: a run's model (or its adapters) and optimizer, as state components."""

from __future__ import annotations

from typing import Any

from megatron.core.utils import unwrap_model


def sharding_metadata() -> dict[str, Any]:
    """The optimizer's state in the shapes of the model's parameters, so that any TP, PP and DP can read it.

    And under the parameters' own names, whichever of its optimizers holds them: experts that are shared out over ranks
    have one of their own. A new dict each time: megatron.core adds this job's process groups to it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def model_state(chunks: list, trainable_only: bool) -> dict[str, Any]:
    """ "model", or "model0", "model1", ... for virtual pipeline stages, as Megatron-LM names them."""
    states = {}
    for index, chunk in enumerate(unwrap_model(chunks)):
        state = chunk.sharded_state_dict(metadata=sharding_metadata())
        if trainable_only:
            names = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
            state = {name: tensor for name, tensor in state.items() if name in names}
        states["model" if len(chunks) == 1 else f"model{index}"] = state
    return states


class ModelState:
    """The weights of a model's chunks; trainable_only: of its adapters alone."""

    def __init__(self, chunks: list, trainable_only: bool = False):
        self.chunks = chunks
        self.trainable_only = trainable_only

    def replicas(self) -> dict[str, dict[str, Any]]:
        """By process group: the tensors that its ranks hold alike.

        Experts are shared out over data-parallel ranks; of what is not split, tensor-parallel ranks have copies.
        """
        groups: dict[str, dict[str, Any]] = {"dp_group": {}, "edp_group": {}, "tp_group": {}}
        for index, chunk in enumerate(unwrap_model(self.chunks)):
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad or not self.trainable_only:
                    dense = getattr(parameter, "allreduce", True)
                    tensor = parameter.detach()
                    groups["dp_group" if dense else "edp_group"][f"{index}.{name}"] = tensor
                    if dense and not getattr(parameter, "tensor_model_parallel", False):
                        groups["tp_group"][f"{index}.{name}"] = tensor
        return groups


class OptimizerState:
    """The optimizer of ``model``: with fp32 masters and moments, each rank its part of them."""

    def __init__(self, optimizer: Any, model: ModelState):
        self.optimizer = optimizer
        self.model = model

    def replicas(self) -> dict[str, Any]:
        """Of an optimizer that is not distributed, and without experts that are shared out: all of its state."""
        return {"dp_group": self.optimizer.state_dict()}
