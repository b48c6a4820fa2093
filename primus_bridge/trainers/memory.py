"""SAVE/memory.json: every rank's memory by phase as measured, beside what was planned for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from primus_bridge.files import write_json
from primus_bridge.megatron.memory import MemoryWatch
from primus_bridge.plan.plan import planned_stages
from primus_bridge.report.notes import MEMORY_FILE

if TYPE_CHECKING:
    from primus_bridge.trainers.base import BaseTrainer


def note_memory(trainer: BaseTrainer, watch: MemoryWatch, step: int) -> None:
    """Gather every rank's, and write them on rank 0. Collective.

    The plan is that of the longest sequence that rank 0 has had, so that both speak of the same.
    """
    parallel, arguments = trainer.parallel, trainer.arguments
    mine = {"rank": parallel.rank, "stage": parallel.pp_rank, **watch.phases().to_dict(), "peak": watch.peak()}
    everyone = [mine]
    if parallel.world_size > 1:
        everyone = [{}] * parallel.world_size
        dist.all_gather_object(everyone, mine)
    if parallel.rank != 0:
        return
    model, adapter, gpu = trainer.start.model, trainer.start.adapter, bool(parallel.layout["gpu"])
    stages = planned_stages(arguments, model, adapter, parallel.world_size, not gpu, watch.longest)
    planned = {
        "length": watch.longest,
        "stages": [
            {
                "weights": stage.weights,
                "gradients": stage.gradients,
                "optimizer": stage.optimizer,
                "activations": stage.activations + stage.working,
            }
            for stage in stages
        ],
    }
    measured = {"unit": "bytes", "step": step, "device": "gpu" if gpu else "cpu", "ranks": everyone, "planned": planned}
    file = trainer.own_files[MEMORY_FILE]
    file.write(lambda: write_json(file.path, measured))
