"""A run in a few numbers, from the lines of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from primus_bridge.callbacks.best import BestEvaluation


class RunSummary(TypedDict):
    """train_loss: the mean of ``loss`` over all log lines of the run, those before a resume included; None without one.
    eval_loss: of the last evaluation; best_eval_loss: the lowest, and best_step where it was; None without any."""

    train_loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None


def summarise(history: Sequence[dict[str, Any]]) -> RunSummary:
    """The summary of a metrics.jsonl's lines (read_history)."""
    losses = [entry["loss"] for entry in history if entry.get("loss") is not None]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    best = BestEvaluation().follow(history)
    return {
        "train_loss": sum(losses) / len(losses) if losses else None,
        "eval_loss": evaluations[-1] if evaluations else None,
        "best_eval_loss": best.loss if best.step is not None else None,
        "best_step": best.step,
    }
