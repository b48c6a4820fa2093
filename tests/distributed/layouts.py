"""Rank functions for the layout tests: the same tiny model and batches, trained at any layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from primus_bridge.config.arguments import BridgeArguments


def arguments_for(model: dict | None = None, **sections: dict) -> BridgeArguments:
    """BridgeArguments with the given fields set: ``arguments_for({"tensor_model_parallel_size": 2}, train={...})``."""
    arguments = BridgeArguments()
    for section, fields in {"model": model or {}, **sections}.items():
        if not isinstance(fields, dict):
            setattr(arguments, section, fields)
            continue
        for name, value in fields.items():
            assert hasattr(getattr(arguments, section), name), (section, name)
            setattr(getattr(arguments, section), name, value)
    return arguments


def synthetic_rows(vocab_size: int, rows: int, longest: int = 24, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Rows of uneven length: (ids, loss weights), the first part of each a masked prompt."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(rows):
        length = int(torch.randint(8, longest + 1, (), generator=generator))
        prompt = int(torch.randint(2, length - 2, (), generator=generator))
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        result.append((ids, [0] * prompt + [1] * (length - prompt)))
    return result


def pad_batch(rows: list[tuple[list[int], list[int]]], length: int) -> dict[str, torch.Tensor]:
    """tokens, labels, loss_mask, position_ids of [rows, length], right padded."""
    batch = {
        "tokens": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.zeros(len(rows), length, dtype=torch.long),
        "loss_mask": torch.zeros(len(rows), length),
        "position_ids": torch.arange(length)[None].repeat(len(rows), 1),
    }
    for index, (ids, weights) in enumerate(rows):
        n = len(ids) - 1
        batch["tokens"][index, :n] = torch.tensor(ids[:-1])
        batch["labels"][index, :n] = torch.tensor(ids[1:])
        batch["loss_mask"][index, :n] = torch.tensor(weights[1:], dtype=torch.float)
    return batch


def train(folder: str, arguments: BridgeArguments, steps: int, global_batch: int = 8, micro_batch: int = 1) -> list:
    """Losses, gradient norms and counts of ``steps`` steps on synthetic rows; equal on every rank of a layout."""
    from primus_bridge.conversion.families import family_of
    from primus_bridge.conversion.hf_folder import HFWeights, read_config
    from primus_bridge.conversion.load import load_weights
    from primus_bridge.conversion.rules import Shard
    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.megatron.model import build_model
    from primus_bridge.megatron.names import global_parameters
    from primus_bridge.megatron.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
    from primus_bridge.megatron.step import train_step
    from primus_bridge.objectives.supervised import supervised

    parallel = parallel_module.initialize(arguments)
    config = read_config(Path(folder))
    family = family_of(config, folder)
    arch = family.architecture(config)
    chunks = build_model(arch, arguments, parallel)
    shard = Shard(parallel.tp_rank, parallel.tp_size)
    load_weights(global_parameters(chunks), HFWeights(Path(folder)), family, arch, shard)
    wrapped = wrap_data_parallel(chunks, arguments)
    optimizer = build_optimizer(wrapped, arguments)
    scheduler = build_scheduler(optimizer, arguments)
    rows = synthetic_rows(arch.vocab_size, global_batch * steps)
    results = []
    for step in range(steps):
        batch = rows[step * global_batch : (step + 1) * global_batch]
        mine = batch[parallel.dp_rank :: parallel.dp_size]
        micro = [pad_batch(mine[i : i + micro_batch], 24) for i in range(0, len(mine), micro_batch)]
        results.append(asdict(train_step(wrapped, optimizer, scheduler, micro, supervised, parallel)))
    parallel_module.destroy_model_parallel()
    return results


def train_layouts(folder: str, runs: list[tuple[BridgeArguments, int]], steps: int) -> list:
    """``train`` for each (arguments, micro batch size), one after another in the same ranks."""
    return [train(folder, arguments, steps, micro_batch=micro) for arguments, micro in runs]
