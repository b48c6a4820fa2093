"""What spawned ranks import: a callback, as a user's module has it, and a function that fails."""

from __future__ import annotations

import os
import time

from primus_bridge import Callback


class Notebook(Callback):
    """Writes a word a step into a file."""

    def __init__(self, path: str):
        self.path = path

    def on_train_start(self, state):
        self.file = open(self.path, "a")
        self.file.write("start ")

    def on_step_end(self, state, metrics):
        self.file.write(f"{state.step} ")

    def on_train_end(self, state):
        self.file.write("end")
        self.file.close()


def raise_in_rank(error: Exception, rank: int) -> None:
    """Raise it in this rank; the others wait for what will not come."""
    if os.environ["RANK"] == str(rank):
        raise error
    time.sleep(60)


def train_in_rank(config: str, overrides: dict) -> dict:
    """One rank of a job that somebody else started."""
    from primus_bridge import SFTConfig, SFTTrainer

    return dict(SFTTrainer(SFTConfig.from_yaml(config, **overrides), [Notebook("joined.txt")]).train())
