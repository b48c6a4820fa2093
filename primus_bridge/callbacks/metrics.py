"""MetricsCallback: a JSON line a log step in SAVE/metrics.jsonl, and TensorBoard events in SAVE/tensorboard."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.callbacks.tensorboard_file import TensorBoardFile
from primus_bridge.checkpoint.manifest import forget_best
from primus_bridge.errors import ConfigError
from primus_bridge.files import writing
from primus_bridge.patient_file import AppendedFile

METRICS_FILE = "metrics.jsonl"


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] without a file. A line cut off by a kill is skipped."""
    path = Path(path)
    if not path.exists():
        return []
    entries = map(_entry, path.read_bytes().splitlines())
    return [entry for entry in entries if entry is not None]


def length_until(path: Path, step: int) -> int:
    """Bytes up to the end of the last whole line of ``step`` or before; 0 at step 0 and without a file."""
    kept = end = 0
    if step == 0 or not path.exists():
        return 0
    with path.open("rb") as file:
        for line in file:
            entry, end = _entry(line), end + len(line)
            if entry is None or not line.endswith(b"\n"):
                continue
            if entry["step"] > step:
                break
            kept = end
    return kept


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None


def _line(entry: dict[str, Any]) -> bytes:
    # NaN and infinity are not JSON: a diverged loss is null in the file
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return (json.dumps(plain) + "\n").encode()


class MetricsCallback(Callback):
    """Keeps one continuous history over kills, resumes and rollbacks: a run that goes on from step k first removes
    later lines, and a best.json that goes by them. While the disk is full lines wait in memory, in their order."""

    def __init__(self) -> None:
        self._lines: AppendedFile | None = None
        self._events: TensorBoardFile | None = None

    def on_train_start(self, state: RunState) -> None:
        folder = state.save_folder
        if folder is None:
            return
        with writing("the run's files", folder):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / METRICS_FILE
            self._lines = AppendedFile(path)
            self._lines.rewind(length_until(path, state.step), [], must=True)
            _forget_best(folder, read_history(path))
            if state.arguments.logger.tensorboard:
                # purge_step hides the events that a killed run wrote after the checkpoint
                self._events = TensorBoardFile(folder / "tensorboard", purge_step=state.step + 1)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if metrics:
            self._add(metrics, "train")
        else:  # a step between two log steps
            self._retry()

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        self._add(metrics, "eval")

    def on_save(self, state: RunState, path: str | Path) -> None:
        self._retry()

    def on_rollback(self, state: RunState, reason: str) -> None:
        if self._lines is not None:
            path, step = self._lines.path, state.step
            waiting = [line for line in self._lines.waiting if json.loads(line)["step"] <= step]
            self._lines.rewind(length_until(path, step), waiting)
            history = [*read_history(path), *map(json.loads, waiting)]
            with suppress(OSError):  # else the next start does
                _forget_best(path.parent, [entry for entry in history if entry["step"] <= step])
        if self._events is not None:
            self._events.purge(state.step + 1)

    def on_error(self, state: RunState, error: BaseException) -> None:
        with suppress(ConfigError):  # the error under way is the one to report
            self.on_train_end(state)

    def on_train_end(self, state: RunState) -> None:
        if state.unlogged:
            self._add(state.unlogged, "train")
        self._retry(must=True)

    def _add(self, metrics: dict[str, Any], group: str) -> None:
        if self._lines is not None:
            self._lines.add(_line(metrics))
        if self._events is not None:
            numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            step = numbers.pop("step")
            values = {f"{group}/{key.removeprefix('eval_')}": value for key, value in numbers.items()}
            self._events.scalars(int(step), values)

    def _retry(self, must: bool = False) -> None:
        for file in (self._lines, self._events):
            if file is not None:
                file.retry(must)


def _forget_best(folder: Path, history: list[dict[str, Any]]) -> None:
    forget_best(folder, {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry})
