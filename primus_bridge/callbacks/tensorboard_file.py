"""TensorBoard's event file, without the thread that usually writes it: a full disk would end that for good."""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from primus_bridge.patient_file import AppendedFile


class TensorBoardFile(AppendedFile):
    """A new event file in ``folder``. purge_step: TensorBoard hides what earlier files hold from this step on.

    Raises ConfigError when it cannot be written now; later it waits, as every AppendedFile does.
    """

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}")
        self.add(_record(file_version="brain.Event:2"), must=True)
        self.purge(purge_step, must=True)

    def purge(self, step: int, must: bool = False) -> None:
        """What was written before is no longer shown from ``step`` on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self.add(_record(step=step, session_log=SessionLog(status=SessionLog.START)), must)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """values: by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.add(_record(step=step, summary=Summary(value=shown)))


def _record(**event: Any) -> bytes:
    """An event of now as it stands in the file: length, checksum, event, checksum."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
    return record.getvalue()
