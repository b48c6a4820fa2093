"""What a run notes down beside its metrics: when it began, saved, ended or failed, and on what machine."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from primus_bridge.errors import ConfigError
from primus_bridge.files import write_json, write_text

REPORT_FILE = "report.html"
EVENTS_FILE = "events.jsonl"
ENVIRONMENT_FILE = "environment.json"


def now() -> str:
    """The time in UTC, to the second: ``2026-03-01T09:30:00+00:00``."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def note(save: Path, event: str, step: int, **facts: Any) -> None:
    """Add a line to events.jsonl: start, save, end, error or export, the step it happened at, and its facts.

    A run that starts at step 0 begins the file anew, as it does with metrics.jsonl. Raises OSError.
    """
    before = [] if event == "start" and step == 0 else read_events(save)
    events = [*before, {"event": event, "time": now(), "step": step, **facts}]
    # the whole file at once: a line that a kill cut off would swallow the one after it
    write_text(save / EVENTS_FILE, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in events))


def note_environment(folder: Path) -> None:
    """Write environment.json: this machine as rank 0 sees it. Imports torch. Raises OSError."""
    from primus_bridge.machine import examine

    write_json(folder / ENVIRONMENT_FILE, {"time": now(), **examine()})


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl, oldest first; [] without a file. Raises ConfigError when they are none of ours."""
    path = folder / EVENTS_FILE
    if not path.is_file():
        return []
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for entry in events:
            datetime.fromisoformat(entry["time"])
            assert isinstance(entry["event"], str) and isinstance(entry["step"], int)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ConfigError("is not the events file of a run; remove it to do without", where=str(path)) from None
    return events


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None without the file. Raises ConfigError when it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError("does not hold a JSON object; remove it to do without", where=str(path))
    return value
