"""ReportCallback: notes down what happened to a run, and keeps SAVE/report.html beside its checkpoints."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.checkpoint.manifest import step_of
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from primus_bridge.files import writing
from primus_bridge.patient_file import PatientFile
from primus_bridge.report.notes import (
    EVENTS_FILE,
    REPORT_FILE,
    add_events,
    happened,
    note_environment,
    set_aside,
)
from primus_bridge.report.page import write_report

AGAIN_AFTER = 60.0
"""Seconds at least between two pages of a run that goes on, and 100 times what the last one took."""


class ReportCallback(Callback):
    """The page is written at checkpoints (once a minute at most), at the end, and when the run fails."""

    def __init__(self) -> None:
        self._not_before = 0.0
        self._events: PatientFile | None = None
        self._waiting: list[dict[str, Any]] = []  # what is not in the file, oldest first

    def on_train_start(self, state: RunState) -> None:
        notes = state.arguments.notes
        self._note(state, "start", must=True, train_iters=state.train_iters, ranks=state.world_size, notes=notes)
        if state.save_folder is not None:
            with writing("the run's files", state.save_folder):
                note_environment(state.save_folder)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if self._events is not None:
            self._events.retry()

    def on_save(self, state: RunState, path: str | Path) -> None:
        # an asynchronous save is told of when the run has gone on from it
        self._note(state, "save", step_of(Path(path)), checkpoint=Path(path).name)
        if time.monotonic() >= self._not_before:
            self._write(state)

    def on_rollback(self, state: RunState, reason: str) -> None:
        self._note(state, "rollback", reason=reason)

    def on_error(self, state: RunState, error: BaseException) -> None:
        message = str(error) or type(error).__name__
        # of what a user can mend the message says all
        told = None if isinstance(error, ConfigError) else "".join(traceback.format_exception(error))
        with suppress(OSError, ConfigError):  # the error under way is the one to report
            self._note(state, "error", must=True, message=message, traceback=told)
            self._write(state)

    def on_train_end(self, state: RunState) -> None:
        self._note(state, "end", must=True, reason=state.stop_reason)
        path = self._write(state)
        if path is not None:
            print(f"report: {path}", flush=True)

    def _note(self, state: RunState, event: str, step: int | None = None, must: bool = False, **facts) -> None:
        """step: where the event belongs; None: where the run is. must: raises ConfigError when it cannot be written."""
        save = state.save_folder
        if save is None:
            return
        if self._events is None:
            self._events = PatientFile(save / EVENTS_FILE)
        self._waiting.append(happened(event, state.step if step is None else step, **facts))
        self._events.write(lambda: self._add_waiting(save), must)

    def _add_waiting(self, save: Path) -> None:
        _add(save, self._waiting)
        self._waiting.clear()

    def _write(self, state: RunState) -> Path | None:
        if state.save_folder is None:
            return None
        began = time.monotonic()
        path = _write(state.save_folder, state.arguments)
        ended = time.monotonic()
        self._not_before = ended + max(AGAIN_AFTER, 100 * (ended - began))
        return path


def note_export(arguments: BridgeArguments, step: int, folder: Path) -> None:
    """On rank 0: note an export, for the page that is written when the run ends."""
    save = arguments.save_folder
    with writing("the run's files", save):
        _add(save, [happened("export", step, folder=str(folder))])


def _add(save: Path, lines: list[dict[str, Any]]) -> None:
    save.mkdir(parents=True, exist_ok=True)
    try:
        add_events(save, lines)
    except ConfigError as error:  # what happened before is not worth the run
        aside = set_aside(save)
        print(f"note: {error.where} was not the events file of a run: it is {aside.name} now", flush=True)
        add_events(save, lines)


def _write(folder: Path, arguments: BridgeArguments) -> Path | None:
    try:
        return write_report(folder, arguments)
    except (OSError, ConfigError) as error:  # the page is not worth the run: primus report makes it again
        print(f"{REPORT_FILE} was not written: {getattr(error, 'strerror', None) or error}", flush=True)
        return None
