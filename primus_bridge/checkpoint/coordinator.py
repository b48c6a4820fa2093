"""Saving and resuming a run: Megatron's shards, RNG per rank, schedule and position, committed by the manifest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
import torch.distributed as dist

from primus_bridge.checkpoint.manifest import (
    HF_ASSETS,
    Checkpoint,
    Manifest,
    commit,
    iteration_folder,
    prune,
)
from primus_bridge.conversion.hf_folder import copy_assets
from primus_bridge.files import write_json
from primus_bridge.together import writing_together


def write_assets(folder: Path, files: Sequence[Path], config: dict[str, Any]) -> None:
    """config.json and the tokenizer files beside the shards, so that a checkpoint exports by itself."""
    assets = folder / HF_ASSETS
    assets.mkdir()
    write_json(assets / "config.json", config)
    copy_assets(files, assets)


def save_run(
    save: Path,
    manifest: Manifest,
    chunks: list,
    optimizer,
    scheduler,
    *,
    assets: Sequence[Path],
    config: dict[str, Any],
    save_total_limit: Optional[int],
) -> Path:
    """Write and commit SAVE/iter_<step>, with the files of ``assets`` (asset_files). Collective.

    Raises ConfigError, the same on every rank, when the disk is full or read-only.
    """
    from primus_bridge.megatron.dist_checkpoint import save_sharded
    from primus_bridge.megatron.rng import rng_state

    folder = iteration_folder(save, manifest.step)
    lead = dist.get_rank() == 0
    with writing_together("a checkpoint", folder, remove=folder):
        if lead:
            # what a killed run left half-written
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    with writing_together("a checkpoint", folder, remove=folder):
        save_sharded(
            folder,
            chunks,
            optimizer if manifest.training_state else None,
            trainable_only=manifest.contents == "adapter",
            common={"step": manifest.step, "scheduler": scheduler.state_dict() if scheduler is not None else None},
        )
        if manifest.training_state:
            (folder / "rng").mkdir(exist_ok=True)
            torch.save(rng_state(), folder / "rng" / f"rank_{dist.get_rank()}.pt")
    with writing_together("a checkpoint", folder, remove=folder):
        if lead:
            write_assets(folder, assets, config)
            commit(folder, manifest)
    if lead and save_total_limit:
        prune(save, save_total_limit)
    return folder


def load_run(checkpoint: Checkpoint, chunks: list, optimizer, scheduler, layout: dict[str, int], seed: int) -> None:
    """Weights, optimizer, schedule and RNG of a training checkpoint. Collective.

    Learning rates, betas and the schedule's length are those of this run's arguments, not the checkpoint's.
    At another layout the ranks' RNG states have no owner: they are seeded anew from (seed, step).
    """
    from primus_bridge.checkpoint.safe_load import load_plain
    from primus_bridge.megatron.dist_checkpoint import load_sharded
    from primus_bridge.megatron.optimizer import keep_hyperparameters
    from primus_bridge.megatron.rng import seed_ranks, set_rng_state

    manifest = checkpoint.manifest
    with keep_hyperparameters(optimizer):
        common = load_sharded(checkpoint.folder, chunks, optimizer, trainable_only=manifest.contents == "adapter")
    scheduler.load_state_dict(common["scheduler"])
    if {"context": 1} | manifest.layout == layout:  # older manifests do not name it
        path = checkpoint.folder / "rng" / f"rank_{dist.get_rank()}.pt"
        set_rng_state(load_plain(path, str(path)))
    else:
        seed_ranks(seed + manifest.step)


def load_weights_only(checkpoint: Checkpoint, chunks: list) -> None:
    """The weights of a checkpoint, of the model or of its adapters, and nothing of the run. Collective."""
    from primus_bridge.megatron.dist_checkpoint import load_sharded

    load_sharded(checkpoint.folder, chunks, trainable_only=checkpoint.manifest.contents == "adapter")
