"""ValidationCallback: evaluate every so many steps, remember the best, and stop when it gets no better."""

from __future__ import annotations

from typing import Any

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.callbacks.best import BestEvaluation
from primus_bridge.callbacks.values import checked, steps
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError

WHO = "ValidationCallback"


class ValidationCallback(Callback):
    """eval_steps: steps between evaluations; None: those of the run (``eval_interval``).
    patience: stop after so many evaluations in a row that were not lower than the best by more than min_delta; None:
    never. A run started again after that ends at once, unless its patience is larger. ``best.loss`` and ``best.step``
    are the best evaluation's. Raises ConfigError for any other value."""

    def __init__(self, eval_steps: int | None = None, patience: int | None = None, min_delta: float = 0.0):
        self.eval_steps = steps(WHO, "eval_steps", eval_steps)
        self.patience = steps(WHO, "patience", patience)
        self.best = BestEvaluation(checked(WHO, "min_delta", float, min_delta))

    def check(self, arguments: BridgeArguments) -> None:
        check_has_validation(arguments, WHO)
        if self.eval_steps is None and arguments.train.eval_interval is None:
            raise ConfigError("give it eval_steps, or the run eval_interval", where=WHO)

    def on_train_start(self, state: RunState) -> None:
        self.best.start(state)
        if self._out_of_patience():
            state.request_stop(f"{self._waited_for()}; a patience above {self.best.waited} goes on")

    def on_rollback(self, state: RunState, reason: str) -> None:
        self.best.start(state)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if self.eval_steps is not None and state.step % self.eval_steps == 0:
            state.request_evaluation()

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if not self.best.better(metrics) and self._out_of_patience():
            state.request_stop(self._waited_for())

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.best.waited >= self.patience

    def _waited_for(self) -> str:
        best = self.best
        evaluations = "1 evaluation" if best.waited == 1 else f"{best.waited} evaluations"
        if best.step is None:
            return f"{evaluations} brought no loss that is a number"
        lower = f"loss lower by more than {best.min_delta:g}" if best.min_delta else "lower loss"
        return f"{evaluations} brought no {lower} than {best.loss:.4f} at step {best.step}"


def check_has_validation(arguments: BridgeArguments, who: str) -> None:
    """Raises ConfigError when the run has nothing to evaluate on."""
    dataset = arguments.dataset
    if dataset.validation_data_path is None and not dataset.validation_split:
        raise ConfigError(
            "there is nothing to evaluate on: give validation_split (--validation_split 0.05) or validation_data_path",
            where=who,
        )
