"""Megatron's torch_dist sharded checkpoints: a model (or its adapters) and its optimizer, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch.nn
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from primus_bridge.errors import ConfigError


def _metadata() -> dict[str, Any]:
    """The optimizer's state in the shapes of the model's parameters, so that any TP, PP and DP can read it.

    And under the parameters' own names, whichever of its optimizers holds them: experts that are shared out over ranks
    have one of their own. A new dict each time: megatron.core adds this job's process groups to it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _model_state(chunks: list, trainable_only: bool) -> dict[str, Any]:
    """ "model", or "model0", "model1", ... for virtual pipeline stages, as Megatron-LM names them."""
    states = {}
    for index, chunk in enumerate(unwrap_model(chunks)):
        state = chunk.sharded_state_dict(metadata=_metadata())
        if trainable_only:
            names = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
            state = {name: tensor for name, tensor in state.items() if name in names}
        states["model" if len(chunks) == 1 else f"model{index}"] = state
    return states


def save_sharded(
    folder: Path, chunks: list, optimizer=None, *, trainable_only: bool = False, common: Optional[dict] = None
) -> None:
    """Write the shards of every rank to ``folder`` (which exists). Collective.

    common: plain values (numbers, strings, lists, dicts), equal on all ranks, kept in common.pt.
    Raises OSError, the same on every rank, when a rank could not write.
    """
    state = _model_state(chunks, trainable_only)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=_metadata())
    state["common"] = common or {}
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        dist_checkpointing.save(state, str(folder), strategy, content_metadata=_metadata())
    except CheckpointException as error:
        # raised on all ranks, but only the first knows why
        reason = [next((str(failure[0]) for failure in error.failures.values()), "")]
        torch.distributed.broadcast_object_list(reason, src=0)
        raise OSError(reason[0]) from error


def load_sharded(folder: Path, chunks: list, optimizer=None, *, trainable_only: bool = False) -> dict[str, Any]:
    """Read this rank's shards into the model (and optimizer); returns ``common``. Collective.

    Raises ConfigError when the checkpoint lacks a tensor of this model, holds it in another shape, or is damaged.
    """
    # Transformer Engine unpickles its extra state (the scales of FP8) freely, and nothing here needs it
    models = {
        name: {key: tensor for key, tensor in state.items() if "_extra_state" not in key}
        for name, state in _model_state(chunks, trainable_only).items()
    }
    state = dict(models)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(models), is_loading=True, metadata=_metadata())
    state["common"] = {}
    # an index that is damaged or hostile fails here, before torch reports the failure at length in its own way
    FileSystemReader(str(folder)).read_metadata()
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, KeyError) as error:
        lines = str(error).strip().splitlines()
        raise ConfigError(
            f"the checkpoint does not fit this model: {lines[0] if lines else error!r}", where=str(folder)
        ) from error
    except CheckpointException as error:  # torch's: each rank's own failure, gathered on all of them
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, ConfigError):
            raise first from None
        # torch.load's own message is a page long; the name of the failure and its first line say enough
        reason = str(first).strip().partition("\n")[0].partition(". ")[0]
        raise ConfigError(
            f"damaged checkpoint: it cannot be read ({type(first).__name__}: {reason})", where=str(folder)
        ) from error
    for name, chunk in zip(models, unwrap_model(chunks), strict=True):
        # a pipeline stage whose layers have no adapters has no such entry
        missing, unexpected = torch.nn.Module.load_state_dict(chunk, loaded.get(name, {}), strict=False)
        assert not unexpected, unexpected
        assert trainable_only or not [key for key in missing if "_extra_state" not in key], missing
    if optimizer is not None:
        optimizer.load_state_dict(_own_groups(loaded["optimizer"], optimizer))
    return loaded["common"]


def _own_groups(loaded: dict, optimizer) -> dict:
    """The optimizer's loaded state with parameter groups as this layout has them.

    The groups lie beside the tensors, an optimizer at a time, and their number depends on the layout: the experts'
    optimizer is there only where experts are shared out, and where the stage has any. All that is needed of the saved
    ones is the number of steps.
    """
    own = getattr(optimizer, "chained_optimizers", [optimizer])
    saved = [part for key, part in loaded.items() if isinstance(key, int) and "optimizer" in part] or [loaded]
    counts = [len(part["optimizer"]["param_groups"]) for part in saved]
    if counts == [len(part.param_groups) for part in own] and (len(own) > 1) == (0 in loaded):
        return loaded
    steps = max(group.get("step", 0) for part in saved for group in part["optimizer"]["param_groups"])
    parts = []
    for index, part in enumerate(own):
        # a stage without experts has nothing of their optimizer
        tensors = loaded if len(own) == 1 else loaded.get(index, {})
        groups = [{k: v for k, v in g.items() if k != "params"} | {"step": steps} for g in part.param_groups]
        parts.append(saved[0] | {"param_state": tensors.get("param_state", {}), "optimizer": {"param_groups": groups}})
    return parts[0] if len(own) == 1 else dict(enumerate(parts))
