"""What a run notes down beside its metrics: when it began, saved, ended or failed, and on what machine."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from primus_bridge.errors import ConfigError
from primus_bridge.files import write_json, write_text

RUN_FILE = "run.yaml"
LEDGER_FILE = "ledger.json"
REPORT_FILE = "report.html"
EVENTS_FILE = "events.jsonl"
MEMORY_FILE = "memory.json"
ENVIRONMENT_FILE = "environment.json"

FACTS: dict[str, dict[str, type]] = {
    "start": {"train_iters": int, "ranks": int, "notes": list},
    "save": {"checkpoint": str},
    "export": {"folder": str},
    "rollback": {"reason": str},
    "error": {"message": str},
}
"""What such an event always has beside its time and step."""


def now() -> str:
    """The time in UTC, to the second: ``2026-03-01T09:30:00+00:00``."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def happened(event: str, step: int, **facts: Any) -> dict[str, Any]:
    """The line of an event of now: start, save, rollback, end, error or export, the step it belongs to, its facts."""
    return {"event": event, "time": now(), "step": step, **facts}


def add_events(save: Path, lines: list[dict[str, Any]]) -> None:
    """Add what ``happened`` to events.jsonl.

    A run that starts at step 0 begins the file anew, as it does with metrics.jsonl. Raises OSError, and ConfigError for
    a file that is none of ours.
    """
    anew = lines[0]["event"] == "start" and lines[0]["step"] == 0
    events = [*([] if anew else read_events(save)), *lines]
    # the whole file at once: a line that a kill cut off would swallow the one after it
    write_text(save / EVENTS_FILE, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in events))


def note(save: Path, event: str, step: int, **facts: Any) -> None:
    """add_events of one that happened now."""
    add_events(save, [happened(event, step, **facts)])


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
        ours = all(map(_is_event, events))
    except ValueError:
        ours = False
    if not ours:
        raise ConfigError("is not the events file of a run; remove it to do without", where=str(path))
    return events


def _is_event(entry: Any) -> bool:
    """Whether it has what the report reads of it. Raises ValueError for a time that is none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("event"), str):
        return False
    facts = {"time": str, "step": int, **FACTS.get(entry["event"], {})}
    if not all(isinstance(entry.get(name), kind) for name, kind in facts.items()):
        return False
    return datetime.fromisoformat(entry["time"]).tzinfo is not None


def set_aside(folder: Path) -> Path:
    """Rename an events.jsonl that is none of ours, so that a new one can begin; its new name. Raises OSError."""
    path = folder / EVENTS_FILE
    return path.replace(path.with_name(f"{EVENTS_FILE}.damaged"))


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
