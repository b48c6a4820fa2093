"""Callback: eight hooks around the training loop. They watch, and may ask it to stop, to evaluate or to save."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError


@dataclass
class RunState:
    """What the loop shows to callbacks."""

    arguments: BridgeArguments
    step: int
    """Optimizer steps done; at on_train_start the step a resumed run continues from."""
    train_iters: int
    world_size: int = 1
    has_validation: bool = False
    """Whether there is anything to evaluate on."""
    tokens: int = 0
    """Tokens trained on since this process started, without padding."""
    nonfinite_steps: int = 0
    """Steps of the whole run whose loss or gradient norm was no finite number."""
    rollbacks: int = 0
    """How often the whole run has gone back to a checkpoint because of one."""
    stop_requested: bool = False
    stop_reason: str | None = None
    interrupted: bool = False
    """A signal ends the run, and the same command goes on; else whoever asked to stop holds it to be done."""
    evaluation_requested: bool = False
    save_requested: bool = False
    unlogged: dict[str, Any] = field(default_factory=dict)
    """At on_train_end and on_error of a run that ended between two log steps: the metrics of its last step, for which
    on_step_end was given {}; else {}."""

    def request_stop(self, reason: str) -> None:
        """Ask the loop to save and end after the current step, in on_train_start before the first; the first reason is
        kept."""
        if not self.stop_requested:
            self.stop_requested, self.stop_reason = True, reason

    def request_evaluation(self) -> None:
        """Ask the loop to evaluate after the current step; without validation data nothing happens."""
        self.evaluation_requested = True

    def request_save(self) -> None:
        """Ask the loop for a checkpoint after the current step."""
        self.save_requested = True

    @property
    def save_folder(self) -> Path | None:
        """checkpoint.save, or None for a run that leaves nothing."""
        save = self.arguments.checkpoint.save
        return Path(save) if save else None


class Callback:
    """Hooks run on global rank 0 only, between steps: a slow one slows training.

    ``metrics`` of on_step_end, at each log step: step, loss, grad_norm, lr, supervised_tokens, tokens,
    tokens_per_second, step_time (seconds), memory and memory_weights, memory_gradients, memory_optimizer,
    memory_activations, memory_buffers (bytes), and nonfinite_steps and rollbacks of a run that had any; {} at the
    others (state.unlogged has the last step's, when the run ends then). Of on_eval_end: step, eval_loss,
    eval_supervised_tokens. A hook that raises ends the run, and every callback's on_error is called. on_rollback:
    weights and state.step are those of a checkpoint again; ``reason`` says what was wrong with which step. A callback
    with state_dict() and load_state_dict(state) goes on where it was: checkpoints hold what it returns.
    """

    def check(self, arguments: BridgeArguments) -> None:
        """Before anything large is read: raise ConfigError when the run lacks what this callback needs."""

    def on_train_start(self, state: RunState) -> None: ...

    def on_step_start(self, state: RunState) -> None: ...

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None: ...

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None: ...

    def on_save(self, state: RunState, path: str | Path) -> None: ...

    def on_rollback(self, state: RunState, reason: str) -> None: ...

    def on_error(self, state: RunState, error: BaseException) -> None: ...

    def on_train_end(self, state: RunState) -> None: ...


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class CallbackList(Callback):
    """Several callbacks as one, called in order. One of a user that raises is told as a ConfigError."""

    def __init__(self, callbacks: Iterable[Callback] = ()):
        self.callbacks = list(callbacks)

    def on_train_start(self, state: RunState) -> None:
        self._tell("on_train_start", state)

    def on_step_start(self, state: RunState) -> None:
        self._tell("on_step_start", state)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._tell("on_step_end", state, metrics)

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._tell("on_eval_end", state, metrics)

    def on_save(self, state: RunState, path: str | Path) -> None:
        self._tell("on_save", state, path)

    def on_rollback(self, state: RunState, reason: str) -> None:
        self._tell("on_rollback", state, reason)

    def on_error(self, state: RunState, error: BaseException) -> None:
        for callback in self.callbacks:
            # the error under way is the one to report: a second one here must not take its place
            try:
                callback.on_error(state, error)
            except Exception:
                traceback.print_exc(file=sys.stderr)

    def on_train_end(self, state: RunState) -> None:
        self._tell("on_train_end", state)

    def _tell(self, hook: str, state: RunState, *more: Any) -> None:
        for callback in self.callbacks:
            try:
                getattr(callback, hook)(state, *more)
            except ConfigError:
                raise
            except Exception as error:
                if type(callback).__module__.startswith("primus_bridge."):
                    raise  # a defect of ours, whose traceback is wanted
                raise blamed(type(callback), f"in {hook} at step {state.step}", error) from error


def blamed(kind: type, when: str, error: Exception) -> ConfigError:
    """What an exception of a user's callback is told as: whose, when, and the line of their file it passed last."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = getattr(sys.modules.get(kind.__module__), "__file__", None)
    frame = next((frame for frame in reversed(frames) if frame.filename == theirs), frames[-1])
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return ConfigError(
        f"callback {kind.__qualname__} raised {told} ({when}); mend it, or take it out of the callbacks",
        where=f"{frame.filename}:{frame.lineno}",
    )
