"""CheckpointCallback: a checkpoint every so many steps, and of the best evaluation, which pruning then leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.callbacks.best import BestEvaluation
from primus_bridge.callbacks.validation import check_has_validation
from primus_bridge.callbacks.values import checked, steps
from primus_bridge.checkpoint.manifest import BEST, committed, iteration_folder, keep_as_best
from primus_bridge.checkpoint.pruning import prune
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from primus_bridge.patient_file import PatientFile

WHO = "CheckpointCallback"


class CheckpointCallback(Callback):
    """output_dir: the run's save folder, for a config that names none. save_steps: steps between checkpoints, beside
    those of ``save_interval``. save_best: save after each evaluation that is the lowest so far; SAVE/best.json names
    the checkpoint, and save_total_limit leaves it. Raises ConfigError for any other value."""

    def __init__(self, output_dir: str | Path | None = None, save_steps: int | None = None, save_best: bool = False):
        folder = checked(WHO, "output_dir", Optional[str], output_dir)
        self.output_dir = None if folder is None else Path(folder).expanduser()
        self.save_steps = steps(WHO, "save_steps", save_steps)
        self.save_best = checked(WHO, "save_best", bool, save_best)
        if self.save_steps is None and not self.save_best:
            raise ConfigError("give it save_steps, or save_best=True", where=WHO)
        self.best = BestEvaluation()
        self._name: PatientFile | None = None

    def check(self, arguments: BridgeArguments) -> None:
        if self.output_dir is not None and self.output_dir.resolve() != arguments.save_folder.resolve():
            raise ConfigError(
                f"its output_dir {self.output_dir} is not the run's save folder {arguments.save_folder} "
                f"({arguments.sources.get('checkpoint.save', 'default')}), where all checkpoints go: keep one",
                where=WHO,
            )
        if self.save_best:
            check_has_validation(arguments, f"{WHO}(save_best=True)")

    def on_train_start(self, state: RunState) -> None:
        self.best.start(state)
        if self.save_best and self.best.step is not None and state.save_folder is not None:
            # a run killed between a checkpoint and its name as the best
            folder = iteration_folder(state.save_folder, self.best.step)
            if folder in committed(state.save_folder):
                self._keep(state, folder)

    def on_rollback(self, state: RunState, reason: str) -> None:
        self.best.start(state)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if self.save_steps is not None and state.step % self.save_steps == 0:
            state.request_save()
        if self._name is not None:
            self._name.retry()

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if self.best.better(metrics) and self.save_best:
            state.request_save()

    def on_save(self, state: RunState, path: str | Path) -> None:
        # of an earlier step than the run is at, when saves are asynchronous
        if self.save_best and Path(path).name == iteration_folder(Path(), self.best.step or 0).name:
            self._keep(state, Path(path))

    def on_train_end(self, state: RunState) -> None:
        if self._name is not None:
            self._name.retry(must=True)

    def _keep(self, state: RunState, folder: Path) -> None:
        assert self.best.step is not None
        step, loss = self.best.step, self.best.loss
        if self._name is None:
            self._name = PatientFile(folder.parent / BEST)
        self._name.write(lambda: keep_as_best(folder, step, loss))
        checkpoint = state.arguments.checkpoint
        if checkpoint.save_total_limit:
            # the best one before was kept until now
            prune(folder.parent, checkpoint.save_total_limit, checkpoint.keep_every)
