"""CheckpointCallback: a checkpoint every so many steps, and of the best evaluation, which pruning then leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.callbacks.best import BestEvaluation
from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
from primus_bridge.callbacks.validation import check_has_validation
from primus_bridge.checkpoint.manifest import keep_as_best
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError


class CheckpointCallback(Callback):
    """output_dir: the run's save folder, for a config that names none. save_steps: steps between checkpoints, beside
    those of ``save_interval``. save_best: save after each evaluation that is the lowest so far; SAVE/best.json names
    the checkpoint, and save_total_limit leaves it."""

    def __init__(self, output_dir: str | Path | None = None, save_steps: int | None = None, save_best: bool = False):
        if save_steps is not None and save_steps < 1:
            raise ConfigError(f"save_steps {save_steps} must be above 0", where="CheckpointCallback")
        if save_steps is None and not save_best:
            raise ConfigError("give it save_steps, or save_best=True", where="CheckpointCallback")
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.save_steps, self.save_best = save_steps, save_best
        self.best = BestEvaluation()

    def check(self, arguments: BridgeArguments) -> None:
        if self.output_dir is not None and self.output_dir.resolve() != arguments.save_folder.resolve():
            raise ConfigError(
                f"its output_dir {self.output_dir} is not the run's save folder {arguments.save_folder} "
                f"({arguments.sources.get('checkpoint.save', 'default')}), where all checkpoints go: keep one",
                where="CheckpointCallback",
            )
        if self.save_best:
            check_has_validation(arguments, "CheckpointCallback(save_best=True)")

    def on_train_start(self, state: RunState) -> None:
        self.best = BestEvaluation()
        if state.step and state.save_folder is not None:
            self.best.follow(read_history(state.save_folder / METRICS_FILE))

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if self.save_steps is not None and state.step % self.save_steps == 0:
            state.request_save()

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if self.best.better(metrics) and self.save_best:
            state.request_save()

    def on_save(self, state: RunState, path: str | Path) -> None:
        if self.save_best and state.step == self.best.step:
            keep_as_best(Path(path), state.step, self.best.loss)
