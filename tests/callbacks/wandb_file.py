"""The records of a run that wandb wrote offline: its log file, whose messages wandb's own protocol buffers parse."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

BLOCK = 32768
HEADER = struct.Struct("<IHB")  # checksum, length, type: whole, first, middle or last part of a record
WHOLE, LAST = 1, 4


@dataclass
class OfflineRun:
    """id, config, rows of the history, the last summary, and the exit code."""

    id: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def offline_runs(save: Path) -> list[OfflineRun]:
    """Every run under SAVE/wandb, oldest first."""
    return [_read(path) for path in sorted(save.glob("wandb/offline-run-*/run-*.wandb"))]


def _read(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.project = record.run.run_id, record.run.project
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            run.history.append({name: value for name, value in items.items() if not name.startswith("_")})
        elif kind == "summary":
            run.summary |= {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update
            }
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, 7 bytes of wandb's own before the first."""
    assert data.startswith(b":W&B")
    place, parts = 7, []
    while place + HEADER.size <= len(data):
        if BLOCK - place % BLOCK < HEADER.size:  # no header is split over two blocks
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        if kind == 0:
            return
        place += HEADER.size
        parts.append(data[place : place + length])
        place += length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []
