"""A step whose loss or gradient norm is no finite number: end the run, pass it over, or go back to a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from primus_bridge.together import SharedError
from primus_bridge.watchdog import beat

if TYPE_CHECKING:
    from primus_bridge.callbacks.base import RunState
    from primus_bridge.megatron.loop import TrainingRun
    from primus_bridge.megatron.step import StepResult

MOST_RETURNS = 3
"""Rollbacks to one checkpoint: when other data does not help three times, more of it will not."""


@dataclass
class NonFinite:
    """Such steps so far, those before a resume included: a part of the trainer's state."""

    steps: int = 0
    in_a_row: int = 0
    returned_to: list[int] = field(default_factory=list)
    """Of each rollback the step of its checkpoint."""
    passed_over: int = 0
    """Sequences of the steps that rollbacks took back: they are consumed, and no step of the run is made of them."""

    def show(self, state: RunState) -> None:
        """Let callbacks see the counts."""
        state.nonfinite_steps, state.rollbacks = self.steps, len(self.returned_to)


def settle(run: TrainingRun, state: RunState, result: StepResult) -> bool:
    """Do what train.on_nonfinite says with the step after state.step, whose update was left out. Collective.

    True: weights, optimizer and state.step are those of a checkpoint again. False: the step is passed over.
    Raises SharedError when the run ends here.
    """
    train, seen = run.arguments.train, run.nonfinite
    seen.steps, seen.in_a_row = seen.steps + 1, seen.in_a_row + 1
    seen.show(state)
    if train.on_nonfinite == "stop":
        raise _diverged(
            state,
            result,
            "nothing of that step is saved. Check the weights and the data, lower lr, or warm up longer; on_nonfinite: "
            "skip passes such steps over",
        )
    if train.on_nonfinite == "skip":
        if seen.in_a_row > train.max_nonfinite:
            raise _diverged(
                state,
                result,
                f"the {train.max_nonfinite} steps before it were passed over for the same reason, and max_nonfinite "
                f"is {train.max_nonfinite}. Check the weights and the data, lower lr, or warm up longer",
            )
        _warn(
            run,
            f"{_said(state, result)}; the weights stay as they are and the batch is passed over "
            f"({seen.in_a_row} in a row, max_nonfinite {train.max_nonfinite}; {seen.steps} in all)",
        )
        return False
    _roll_back(run, state, result)
    return True


def _roll_back(run: TrainingRun, state: RunState, result: StepResult) -> None:
    seen, most = run.nonfinite, run.arguments.train.max_nonfinite
    if len(seen.returned_to) == most:
        why = f"the run has had all of its rollbacks, max_nonfinite {most}"
        raise _diverged(state, result, f"{why}. Check the weights and the data, lower lr, or warm up longer")
    beat(f"the rollback after step {state.step}")
    step = run.rollback()
    if step is None:
        raise _diverged(
            state,
            result,
            "there is no checkpoint in save to go back to yet: lower save_interval, or on_nonfinite: skip",
        )
    if seen.returned_to.count(step) == MOST_RETURNS:
        why = f"the run has gone back to the checkpoint of step {step} {MOST_RETURNS} times, to other data each time"
        raise _diverged(state, result, f"{why}. Go on from an older checkpoint with a lower lr")
    said = _said(state, result)
    lost = state.step + 1 - step
    seen.returned_to.append(step)
    seen.passed_over += lost * run.arguments.train.global_batch_size
    seen.show(state)
    state.step = step
    again = f"step {step + 1}" if lost == 1 else f"steps {step + 1} to {step + lost}"
    _warn(
        run,
        f"{said}; back at the checkpoint of step {step}, {again} again with the data after it "
        f"(rollback {len(seen.returned_to)}, max_nonfinite {most})",
    )
    if run.parallel.rank == 0:
        run.callbacks.on_rollback(state, said)


def _said(state: RunState, result: StepResult) -> str:
    return f"step {state.step + 1}: loss {result.loss:g}, gradient norm {result.grad_norm:g}"


def _diverged(state: RunState, result: StepResult, more: str) -> SharedError:
    numbers = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
    return SharedError(f"training diverged at step {state.step + 1} ({numbers}); {more}")


def _warn(run: TrainingRun, text: str) -> None:
    if run.parallel.rank == 0:
        print(f"WARNING   {text}", flush=True)
