"""ProgressCallback: a bar on a terminal, plain lines elsewhere; at the end the loss curve, as text and PNG."""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.checkpoint.manifest import step_of

PLAIN_INTERVAL = 1.0
"""Seconds between two plain lines at least; the last step is always shown."""


def _seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressCallback(Callback):
    """Shows step/total, loss, learning rate, tokens per second and the time left."""

    def __init__(self) -> None:
        self._progress: Any = None  # rich's Progress
        self._task: Any = None
        self._start_step = self._timed_step = 0
        self._seconds = 0.0  # of the steps from the one to the other, without evaluations and saves
        self._shown_at = 0.0
        self._shown_step = -1
        self._metrics: dict[str, Any] = {}

    def on_train_start(self, state: RunState) -> None:
        self._start_step = self._timed_step = state.step
        self._seconds = 0.0
        if state.step:
            self._say(f"resuming at step {state.step} of {state.train_iters}")
        terminal = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
        if terminal is not None and state.arguments.logger.progress:
            self._start_bar(state, terminal)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if metrics:
            self._take(metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=state.step, **self._fields(state))
        elif metrics:
            last = state.step >= state.train_iters
            if last or time.monotonic() - self._shown_at >= PLAIN_INTERVAL:
                self._plain_line(state)

    def on_eval_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        tokens = metrics.get("eval_supervised_tokens")
        over = f" over {tokens:,} tokens" if tokens else ""
        loss = metrics["eval_loss"]
        never = "" if math.isfinite(loss) else ": no finite number, which never counts as the best"
        self._say(f"step {state.step}: evaluation loss {loss:.4f}{over}{never}")

    def on_save(self, state: RunState, path: str | Path) -> None:
        self._say(f"step {step_of(Path(path))}: saved {path}")

    def on_rollback(self, state: RunState, reason: str) -> None:
        self._start_step = self._timed_step = state.step
        self._seconds = 0.0

    def on_error(self, state: RunState, error: BaseException) -> None:
        self._stop_bar()

    def on_train_end(self, state: RunState) -> None:
        if state.unlogged:
            self._take(state.unlogged)
        if self._progress is not None:
            self._progress.update(self._task, **self._fields(state))
        elif self._metrics and self._shown_step != self._metrics["step"]:
            self._plain_line(state, ended=True)
        self._stop_bar()
        self._metrics = {}
        if state.save_folder is not None:
            self._show_curve(state.save_folder)

    def _take(self, metrics: dict[str, Any]) -> None:
        if not self._metrics and "memory_weights" in metrics:
            self._say(_memory_line(metrics))
        self._metrics = metrics
        self._seconds += metrics["step_time"] * (metrics["step"] - self._timed_step)
        self._timed_step = metrics["step"]

    def _start_bar(self, state: RunState, stream) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss [bold cyan]{task.fields[loss]}"),
            TextColumn("lr {task.fields[lr]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TextColumn("ETA {task.fields[left]}"),
            console=Console(file=stream),
            refresh_per_second=4,
        )
        fields = {"loss": "-", "lr": "-", "speed": "-", "left": "-"}
        self._task = self._progress.add_task("training", total=state.train_iters, completed=state.step, **fields)
        self._progress.start()

    def _stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _fields(self, state: RunState) -> dict[str, str]:
        metrics = self._metrics
        if not metrics:
            return {}
        return {
            "loss": f"{metrics['loss']:.4f}",
            "lr": f"{metrics.get('lr', 0.0):.2e}",
            "speed": f"{metrics.get('tokens_per_second', 0.0):,.0f}",
            "left": self._left(state),
        }

    def _left(self, state: RunState) -> str:
        """How long the steps that are left take when they take as long as those so far."""
        done = self._timed_step - self._start_step
        return _seconds(self._seconds / done * (state.train_iters - state.step)) if done else "-"

    def _plain_line(self, state: RunState, ended: bool = False) -> None:
        self._shown_at, self._shown_step = time.monotonic(), self._metrics["step"]
        width = len(str(state.train_iters))
        fields = self._fields(state)
        left = "" if ended else f"  ETA {fields['left']:>5}"
        self._say(
            f"step {self._shown_step:>{width}}/{state.train_iters}  loss {fields['loss']:>8}  lr {fields['lr']}"
            f"  grad norm {self._metrics.get('grad_norm', 0.0):7.3f}  {fields['speed']:>8} tok/s{left}"
        )

    def _say(self, text: str) -> None:
        if self._progress is not None:
            # above the bar; markup off, as a path may hold brackets
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def _show_curve(self, folder: Path) -> None:
        from primus_bridge.callbacks import curve

        history = curve.load(folder)
        encoding = (sys.stdout.encoding or "").lower()
        text = curve.terminal_curve(history, width=_width(), ascii_only="utf" not in encoding)
        if text:
            print("\n" + text + "\n", flush=True)
        try:
            wrote = curve.write_png(history, folder / "loss.png", title=f"Training loss of {folder.resolve().name}")
        except ImportError:
            print("loss.png was not written: matplotlib is missing (pip install matplotlib)", flush=True)
            return
        except OSError as error:  # the picture is not worth the run: its numbers are in metrics.jsonl
            print(f"loss.png was not written: {error.strerror or error}", flush=True)
            return
        if wrote:
            print(f"loss curve: {folder / 'loss.png'}", flush=True)


def _memory_line(metrics: dict[str, Any]) -> str:
    from primus_bridge.report.headline import size

    parts = {name.removeprefix("memory_"): count for name, count in metrics.items() if name.startswith("memory_")}
    shown = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    return f"memory    {size(sum(parts.values()))} on rank 0: {shown}"


def _width() -> int:
    # COLUMNS is honoured by get_terminal_size; a log file gets 80
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, 100))
