"""The best evaluation of a run so far, over kills and resumes: what early stopping and best checkpoints go by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from primus_bridge.callbacks.base import RunState
from primus_bridge.callbacks.metrics import METRICS_FILE, read_history


class BestEvaluation:
    """loss, step: of the best evaluation (infinite and None before the first); waited: evaluations since.

    A loss counts as better when it is lower by more than ``min_delta``; one that is not a number never is.
    """

    def __init__(self, min_delta: float = 0.0):
        self.min_delta = min_delta
        self.loss, self.step, self.waited = math.inf, None, 0  # type: float, int | None, int

    def better(self, metrics: dict[str, Any]) -> bool:
        """Count one evaluation (step, eval_loss); True when it is the best so far."""
        loss = metrics["eval_loss"]
        if loss is not None and math.isfinite(loss) and loss < self.loss - self.min_delta:
            self.loss, self.step, self.waited = loss, metrics["step"], 0
            return True
        self.waited += 1
        return False

    def start(self, state: RunState) -> BestEvaluation:
        """At on_train_start and on_rollback: forget all evaluations but those that the run goes on from."""
        self.loss, self.step, self.waited = math.inf, None, 0
        if state.step and state.save_folder is not None:
            history = read_history(state.save_folder / METRICS_FILE)
            # after a rollback on a full disk later ones may still be there
            self.follow(entry for entry in history if entry["step"] <= state.step)
        return self

    def follow(self, history: Iterable[dict[str, Any]]) -> BestEvaluation:
        """Count the evaluations of a metrics.jsonl; the same object."""
        for entry in history:
            if "eval_loss" in entry:
                self.better(entry)
        return self
