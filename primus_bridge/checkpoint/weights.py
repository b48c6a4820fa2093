"""Checkpoints of weights alone: what a conversion writes, and what a run starts from."""

from __future__ import annotations

from pathlib import Path

from primus_bridge.checkpoint.components import SharingPattern, StateComponent
from primus_bridge.checkpoint.coordinator import Assets, CheckpointCoordinator
from primus_bridge.checkpoint.manifest import Checkpoint, Manifest


def save_weights(save: Path, manifest: Manifest, chunks: list, assets: Assets) -> Path:
    """Write and commit SAVE/iter_<step> with nothing but a model's or an adapter's weights. Collective."""
    from primus_bridge.megatron.sharded_state import ModelState

    model = ModelState(chunks, trainable_only=manifest.contents == "adapter")
    component = StateComponent("model", model, SharingPattern.GLOBAL, metadata={"format": "torch_dist"})
    coordinator = CheckpointCoordinator(save, [component], {})
    coordinator.begin(manifest, assets)
    return coordinator.finish()


def load_weights_only(checkpoint: Checkpoint, chunks: list) -> None:
    """The weights of a checkpoint, of the model or of its adapters, and nothing of the run. Collective."""
    from primus_bridge.megatron.dist_checkpoint import load_sharded

    load_sharded(checkpoint.folder, chunks, trainable_only=checkpoint.manifest.contents == "adapter")
