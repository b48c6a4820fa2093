"""RunCheckpoints: a training run's checkpoints: when each begins and is done, and what becomes of one that fails."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Optional

from primus_bridge.checkpoint.coordinator import Assets, CheckpointCoordinator, SaveOptions
from primus_bridge.checkpoint.failures import SaveFailed
from primus_bridge.together import SharedError

if TYPE_CHECKING:
    from primus_bridge.trainers.base import BaseTrainer


class RunCheckpoints:
    """What the loop asks for (see its Checkpoints).

    A save that fails leaves the checkpoints before it, and the run goes on; ``max_save_failures`` of them in a row end
    it, and so does one that the run would have ended with.
    """

    def __init__(self, run: BaseTrainer):
        self.run = run
        checkpoint = run.arguments.checkpoint
        options = SaveOptions(
            checkpoint.async_save,
            checkpoint.save_total_limit,
            checkpoint.keep_every,
            weights_only=not checkpoint.save_optim,
            validation_level=checkpoint.validation_level,
        )
        self.coordinator = CheckpointCoordinator(
            run.save_folder, run.get_state_components(), run.get_process_groups(), options
        )
        self.failures = 0
        """Saves that failed since the last one that did not."""

    @property
    def pending(self) -> bool:
        return self.coordinator.pending

    @property
    def writing(self) -> bool:
        return self.coordinator.writing

    def begin(self, step: int, consumed_samples: int, must: bool) -> None:
        """Raises SaveFailed when it fails and the run cannot go on without it."""
        self.run.progress.step, self.run.progress.consumed_samples = step, consumed_samples
        with self._bearing(must):
            assets = Assets(self.run.assets, self.run.start.model.architecture.hf_config)
            self.coordinator.begin(self.run.manifest(), assets)
        # else the model has moved on by the time that the checkpoint is committed
        if self.run.arguments.checkpoint.async_save:
            self._export(must)

    def finish(self, must: bool) -> Optional[Path]:
        """The folder of the checkpoint that began last, committed; None when it failed and the run goes on."""
        path = None
        with self._bearing(must):
            path = self.coordinator.finish()
            self.failures = 0
        if path is not None and not self.run.arguments.checkpoint.async_save:
            self._export(must)
        return path

    def _export(self, must: bool) -> None:
        """The Hugging Face folder that is due beside this checkpoint, which does not depend on it."""
        try:
            self.run.export_beside(self.run.progress.step)
        except SharedError as error:
            if must:
                raise
            self.run.say(f"WARNING   {error}", "          the checkpoints stand and training goes on")

    @contextmanager
    def _bearing(self, must: bool) -> Iterator[None]:
        limit = self.run.arguments.checkpoint.max_save_failures
        try:
            yield
        except SaveFailed as error:
            self.failures += 1
            if must:
                raise
            if self.failures >= limit:
                times = f"{limit} saves in a row have failed (max_save_failures)"
                raise SaveFailed(f"{error.message}; {times}, the run ends", where=error.where) from error
            self.run.say(
                f"WARNING   {error}",
                f"          the checkpoints before it stand and training goes on; failed save {self.failures} of the "
                f"{limit} in a row that end the run (max_save_failures)",
            )
