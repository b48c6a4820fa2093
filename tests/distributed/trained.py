"""Runs of the real trainer in the ranks of harness.py's jobs, one after the other in the same processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from primus_bridge.trainers.posttrain import SFTTrainer
from tests.cli.example import loss_lines
from tests.distributed.harness import run_distributed


@dataclass
class Trained:
    """What is known of a run of this process: ``lines`` of metrics.jsonl, the ``samples`` of each step, the message of
    its ConfigError."""

    lines: list[dict[str, Any]]
    samples: list[list[int]]
    refused: str | None = None

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines]


class Recorded(SFTTrainer):
    """Notes which samples each step is given."""

    def setup(self) -> None:
        super().setup()
        self.samples: list[list[int]] = []
        give = self.loader.next

        def next_batch(count: int):
            batch = give(count)
            self.samples.append([sequence.index for sequence in batch])
            return batch

        self.loader.next = next_batch  # type: ignore[method-assign]


def train_here(runs: list[list[str]]) -> list[Trained]:
    """In a rank: a training of each run's words (example.train_words)."""
    from primus_bridge.config import load_arguments
    from primus_bridge.errors import ConfigError
    from primus_bridge.launch.environment import choose_device
    from primus_bridge.megatron import parallel

    choose_device(None)
    done = []
    for words in runs:
        arguments = load_arguments(None, words[1:], None)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        trainer = Recorded(arguments, module_rank=rank, module_world_size=world_size)
        refused = None
        try:
            trainer.run()
        except ConfigError as error:
            refused = str(error)
            parallel.leave()
        save = Path(arguments.save_folder)
        lines = loss_lines(save) if (save / "metrics.jsonl").is_file() else []
        done.append(Trained(lines, getattr(trainer, "samples", []), refused))
    return done


def train_on(ranks: int, runs: list[list[str]]) -> list[Trained]:
    """``train_here`` on so many ranks: what rank 0 knows."""
    return run_distributed(train_here, ranks, runs)[0]
