"""MetricsCallback: a JSON line a log step in SAVE/metrics.jsonl, and TensorBoard events in SAVE/tensorboard."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.checkpoint.manifest import forget_best
from primus_bridge.files import write_text, writing

METRICS_FILE = "metrics.jsonl"


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] without a file. A line cut off by a kill is skipped."""
    path = Path(path)
    if not path.exists():
        return []
    history = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            history.append(entry)
    return history


def rewind_history(path: str | Path, step: int) -> None:
    """Remove the lines after ``step`` that a killed run left, in one atomic replacement."""
    path = Path(path)
    if not path.exists():
        return
    kept = [entry for entry in read_history(path) if entry["step"] <= step] if step > 0 else []
    write_text(path, "".join(_line(entry) for entry in kept))


def _line(entry: dict[str, Any]) -> str:
    # NaN and infinity are not JSON: a diverged loss is null in the file
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(plain) + "\n"


class MetricsCallback(Callback):
    """Keeps one continuous history over kills, resumes and rollbacks: a run that goes on from step k first removes
    later lines, and a best.json that goes by them."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._writer: Any = None  # tensorboard's SummaryWriter

    def on_train_start(self, state: RunState) -> None:
        folder = state.save_folder
        if folder is None:
            return
        with writing("the metrics", folder):
            folder.mkdir(parents=True, exist_ok=True)
            rewind_history(folder / METRICS_FILE, state.step)
            history = read_history(folder / METRICS_FILE)
            forget_best(folder, {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry})
            self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
            if state.arguments.logger.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # purge_step hides the events that a killed run wrote after the checkpoint
                self._writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=state.step + 1)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._write(metrics, "train")

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._write(metrics, "eval")

    def on_save(self, state: RunState, path: str | Path) -> None:
        if self._writer is not None:
            self._writer.flush()

    def on_rollback(self, state: RunState, reason: str) -> None:
        self._close()
        self.on_train_start(state)

    def on_error(self, state: RunState, error: BaseException) -> None:
        with suppress(OSError):  # what could not be written before cannot be written now
            self._close()

    def on_train_end(self, state: RunState) -> None:
        self._close()

    def _write(self, metrics: dict[str, Any], group: str) -> None:
        if not metrics:  # a step between two log steps
            return
        if self._file is not None:
            with writing("the metrics", Path(self._file.name).parent):
                self._file.write(_line(metrics))
                self._file.flush()
        if self._writer is not None:
            for key, value in metrics.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{group}/{key.removeprefix('eval_')}", value, metrics["step"])

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
