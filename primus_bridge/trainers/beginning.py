"""How a run begins: which checkpoints it goes on from, all ranks together, and what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from primus_bridge.config.arguments import BridgeArguments

if TYPE_CHECKING:
    from primus_bridge.checkpoint.start import StartingPoint
    from primus_bridge.errors import ConfigError
    from primus_bridge.trainers.base import BaseTrainer


def find_start(arguments: BridgeArguments, save: Path) -> StartingPoint:
    """Where the run starts; the checkpoints that it reads are whole. What is damaged or half-written in ``save`` goes.

    Collective, under the lock of ``save``.
    """
    import torch.distributed as dist

    from primus_bridge.checkpoint.integrity import check_together, refusal
    from primus_bridge.checkpoint.pruning import clean_uncommitted, set_aside
    from primus_bridge.files import writing
    from primus_bridge.preflight import check
    from primus_bridge.together import refusing_together, same_on_all

    damaged: dict[Path, ConfigError] = {}
    while True:
        with refusing_together(patient=True):
            start = check(arguments, damaged)
        same_on_all("start from", [str(one.folder) for one in start.checkpoints])
        verify = arguments.checkpoint.verify_checksums
        found = {one.folder: check_together(one, verify) for one in start.checkpoints}
        found = {folder: findings for folder, findings in found.items() if findings}
        if not found:
            break
        damaged |= {folder: refusal(folder, findings) for folder, findings in found.items()}
    with refusing_together():
        if dist.get_rank() == 0:
            with writing("the run's files", save):
                set_aside(save, start.passed_over)
                clean_uncommitted(save)  # what a killed run left half-written
    return start


def announcement(run: BaseTrainer) -> list[str]:
    """What is said before the first step: model, training, layout, data, and what a checkpoint has otherwise."""
    from primus_bridge.checkpoint.changes import changed_arguments
    from primus_bridge.peft.targets import left_out

    start, parallel, train = run.start, run.parallel, run.arguments.train
    arch = start.model.architecture
    trainable = run.lora.describe() if run.lora else "all weights"
    lines = [
        f"model     {start.model.name} ({arch.model_type}, {arch.num_layers} layers), {start.says}",
        f"training  {run.stage}, {trainable}, {run.arguments.mixed_precision}, "
        f"steps {run.step} to {train.train_iters} of {train.global_batch_size} samples"
        + (f", {train.num_epochs:g} epochs" if train.num_epochs is not None else ""),
        f"layout    tensor {parallel.tp_size} x pipeline {parallel.pp_size} x "
        + (f"context {parallel.cp_size} x " if parallel.cp_size > 1 else "")
        + f"data {parallel.dp_size} "
        f"= {parallel.world_size} ranks"
        + (f", expert {parallel.ep_size} x tensor {parallel.etp_size}" if parallel.ep_size > 1 else "")
        + (", sequence parallel" if run.arguments.model.sequence_parallel else "")
        + (f", {parallel.vp_size} virtual stages" if parallel.vp_size > 1 else ""),
        *run.data.ledger.lines(),
    ]
    if run.lora and (left := left_out(run.arguments.peft.target_modules, start.model.family, arch)):
        lines.append(
            f"note: all-linear leaves out {', '.join(left)}: their names end as those of the routed experts, which get "
            "no adapters; name them too (lora_target_modules) to train them"
        )
    changed = list(start.changed)
    if start.resume is not None:
        changed += changed_arguments(start.resume.manifest, run.arguments)
    lines += [f"forced    {line}" for line in start.forced]
    lines += [f"changed   {line}" for line in changed if line not in start.forced]
    lines += [f"note: {line}" for line in start.notes]
    if run.step >= train.train_iters:
        lines.append(f"nothing to train: the checkpoint is at step {run.step} of {train.train_iters}")
    return lines
