"""A save folder as a value: everything that the report shows, read from the files that a run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional

from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
from primus_bridge.checkpoint.manifest import Manifest, committed, read_manifest
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.run_yaml import read_run_yaml
from primus_bridge.data.ledger import Ledger
from primus_bridge.errors import ConfigError
from primus_bridge.report.notes import (
    ENVIRONMENT_FILE,
    LEDGER_FILE,
    MEMORY_FILE,
    RUN_FILE,
    now,
    read_events,
    read_object,
)
from primus_bridge.report.series import Lines

ENVIRONMENT = {"primus_bridge", "python", "system", "packages", "devices", "optional", "patches"}
"""What machine.examine gives."""

Outcome = Literal["finished", "stopped", "failed", "open"]
"""open: no end is noted; the run goes on, or was killed."""


@dataclass
class Saved:
    """A committed checkpoint that is still there."""

    folder: Path
    manifest: Manifest

    @property
    def bytes(self) -> int:
        return sum(self.manifest.files.values())


@dataclass
class Session:
    """One start of the run, from ``start`` to the last thing it noted."""

    start: dict[str, Any]
    events: list[dict[str, Any]]
    """What followed, oldest first."""

    @property
    def seconds(self) -> float:
        """From its start to the last thing noted."""
        last = (self.events or [self.start])[-1]
        return (_time(last) - _time(self.start)).total_seconds()

    @property
    def last(self) -> Optional[dict[str, Any]]:
        """The end or the error; None while there is neither."""
        return next((entry for entry in reversed(self.events) if entry["event"] in ("end", "error")), None)


@dataclass
class Report:
    folder: Path
    arguments: BridgeArguments
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    sessions: list[Session]
    ledger: Optional[Ledger]
    environment: Optional[dict[str, Any]]
    memory: Optional[dict[str, Any]]
    """Of every rank, measured and planned."""
    checkpoints: list[Saved]
    """Oldest first."""
    exports: list[Path]
    """Hugging Face folders, the one of the end last."""
    written: str
    """When this was read, in UTC."""

    @cached_property
    def training(self) -> Lines:
        """The lines of training steps."""
        return Lines.of([line for line in self.history if "loss" in line])

    @cached_property
    def evaluations(self) -> Lines:
        return Lines.of([line for line in self.history if line.get("eval_loss") is not None])

    @property
    def begun_at(self) -> list[int]:
        """Steps from which the run went on: at its starts, and when it went back to a checkpoint."""
        events = [entry for session in self.sessions for entry in (session.start, *session.events)]
        return [entry["step"] for entry in events if entry["event"] in ("start", "rollback")]

    @property
    def train_iters(self) -> int:
        return self.sessions[-1].start["train_iters"] if self.sessions else self.arguments.train.train_iters

    @property
    def step(self) -> int:
        """The last step that anything is known of."""
        noted = [entry["step"] for session in self.sessions for entry in (session.start, *session.events)]
        return max([*noted[-1:], *(line["step"] for line in self.history[-1:])], default=0)

    @property
    def samples(self) -> int:
        """Sequences trained on; of the steps before the newest checkpoint at whatever batch size they had."""
        step, consumed = 0, 0
        if self.checkpoints:
            step, consumed = self.checkpoints[-1].manifest.step, self.checkpoints[-1].manifest.consumed_samples
        return consumed + (self.step - step) * self.arguments.train.global_batch_size

    @property
    def ranks(self) -> int:
        """Of the last session; without notes those of the newest checkpoint, else what one replica needs."""
        if self.sessions:
            return self.sessions[-1].start["ranks"]
        model = self.arguments.model
        replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
        layout = self.checkpoints[-1].manifest.layout if self.checkpoints else {}
        return replica * layout.get("data", 1)

    @property
    def outcome(self) -> Outcome:
        last = self.sessions[-1].last if self.sessions else None
        if last is not None and last["event"] == "error":
            return "failed"
        if last is None and self.sessions:
            return "open"
        if self.step >= self.train_iters:
            return "finished"
        return "open" if last is None else "stopped"


def collect(folder: Path, arguments: Optional[BridgeArguments] = None) -> Report:
    """Read a save folder; ``arguments``: those of the run, where run.yaml need not be read for them.

    Raises ConfigError when it is no run's save folder, or one of the files in it is not what a run writes.
    """
    if arguments is None:
        if not (folder / RUN_FILE).is_file():
            raise ConfigError(f"is not the save folder of a run: it has no {RUN_FILE}", where=str(folder))
        arguments = read_run_yaml(folder / RUN_FILE)
    ledger = read_object(folder / LEDGER_FILE)
    try:
        read_ledger = None if ledger is None else Ledger.from_dict(ledger)
    except (KeyError, TypeError):
        where = str(folder / LEDGER_FILE)
        raise ConfigError("is not the ledger of a run; remove it to do without", where=where) from None
    return Report(
        folder=folder.absolute(),
        arguments=arguments,
        history=_history(folder / METRICS_FILE),
        sessions=_sessions(read_events(folder)),
        ledger=read_ledger,
        environment=_environment(folder / ENVIRONMENT_FILE),
        memory=_memory(folder / MEMORY_FILE),
        checkpoints=_checkpoints(folder),
        exports=_exports(folder, arguments),
        written=now(),
    )


def _time(entry: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(entry["time"])


def _sessions(events: list[dict[str, Any]]) -> list[Session]:
    sessions: list[Session] = []
    for entry in events:
        if entry["event"] == "start":
            sessions.append(Session(entry, []))
        elif sessions:
            sessions[-1].events.append(entry)
    return sessions


def _history(path: Path) -> list[dict[str, Any]]:
    history = read_history(path)
    for line in history:
        if not isinstance(line["step"], int):
            raise ConfigError("has a line whose step is no whole number; remove that line", where=str(path))
        for key in ("loss", "eval_loss"):
            if not isinstance(line.get(key), (int, float, type(None))):
                raise ConfigError(f"has a line whose {key} is no number; remove that line", where=str(path))
    return history


def _environment(path: Path) -> Optional[dict[str, Any]]:
    found = read_object(path)
    if found is not None and not found.keys() >= ENVIRONMENT:
        raise ConfigError("is not the environment of a run; remove it to do without", where=str(path))
    return found


def _memory(path: Path) -> Optional[dict[str, Any]]:
    found = read_object(path)
    if found is not None and not found.keys() >= {"step", "ranks", "planned"}:
        raise ConfigError("is not the memory of a run's ranks; remove it to do without", where=str(path))
    return found


def _checkpoints(folder: Path) -> list[Saved]:
    """The manifests alone: whether every file is whole is for a run that goes on from it to check."""
    return [Saved(path.absolute(), read_manifest(path)) for path in committed(folder)]


def _exports(folder: Path, arguments: BridgeArguments) -> list[Path]:
    final = Path(arguments.checkpoint.hf_save_path or folder / "hf").absolute()
    between = sorted(final.parent.glob(f"{final.name}_iter_*"))
    return [path for path in (*between, final) if any((path / name).is_file() for name in EXPORT_FILES)]


EXPORT_FILES = ("adapter_config.json", "config.json")
