"""Loading Megatron's torch_dist checkpoints: a model (or its adapters) and its optimizer, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import torch.nn
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from primus_bridge.checkpoint.safe_load import refusal_of_torch
from primus_bridge.errors import ConfigError
from primus_bridge.megatron.optimizer import parts
from primus_bridge.megatron.optimizer_shards import optimizer_shards, steps_taken
from primus_bridge.megatron.sharded_state import model_state, sharding_metadata


def load_sharded(folder: Path, chunks: list, optimizer=None, *, trainable_only: bool = False) -> None:
    """Read this rank's shards into the model (and optimizer). Collective.

    Raises ConfigError when the checkpoint lacks a tensor of this model, holds it in another shape, or is damaged.
    """
    # Transformer Engine unpickles its extra state (the scales of FP8) freely, and nothing here needs it
    models = {
        name: {key: tensor for key, tensor in state.items() if "_extra_state" not in key}
        for name, state in model_state(chunks, trainable_only).items()
    }
    state = dict(models)
    if optimizer is not None:
        state["optimizer"], state["optimizer_tensors"] = optimizer_shards(
            optimizer, dict(models), sharding_metadata(), loading=True
        )
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
        raise ConfigError(
            f"damaged checkpoint: it cannot be read ({type(first).__name__}: {refusal_of_torch(first)})",
            where=str(folder),
        ) from error
    for name, chunk in zip(models, unwrap_model(chunks), strict=True):
        # a pipeline stage whose layers have no adapters has no such entry
        missing, unexpected = torch.nn.Module.load_state_dict(chunk, loaded.get(name, {}), strict=False)
        assert not unexpected, unexpected
        assert trainable_only or not [key for key in missing if "_extra_state" not in key], missing
    if optimizer is not None:
        if "optimizer" not in loaded:
            raise ConfigError("damaged checkpoint: common.pt has no optimizer", where=str(folder))
        optimizer.load_state_dict(_own_groups(loaded["optimizer"], optimizer, loaded.get("optimizer_steps")))


def _own_groups(loaded: dict, optimizer, steps: Optional[int]) -> dict:
    """The optimizer's loaded state with parameter groups as this run has them.

    The groups lie beside the tensors, an optimizer at a time, and their number depends on the layout: the experts'
    optimizer is there only where experts are shared out, and where the stage has any. Their options depend on the kind
    of optimizer, and are those of this run's arguments anyway. All that is needed of the saved ones is the number of
    steps (None: of an older checkpoint). A distributed optimizer has its tensors by now.
    """
    own = parts(optimizer)
    if not all(isinstance(part, DistributedOptimizer) for part in own):
        return loaded
    saved = [part for key, part in loaded.items() if isinstance(key, int) and "optimizer" in part] or [loaded]
    if steps is None:
        steps = steps_taken(loaded)
    rest = {key: value for key, value in saved[0].items() if key != "param_state"}  # of older checkpoints
    states = []
    for part in own:
        groups = [{k: v for k, v in g.items() if k != "params"} | {"step": steps} for g in part.param_groups]
        states.append(rest | {"optimizer": {"param_groups": groups}})
    return states[0] if len(own) == 1 else dict(enumerate(states))
