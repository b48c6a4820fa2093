"""What test_workers runs, in a process group of its own: rows to samples in worker processes, and signals meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from primus_bridge.data.formats.base import Format
from primus_bridge.data.formats.instruction import alpaca
from primus_bridge.data.prepare import CHUNK_ROWS, PlacedRow, Preparation, prepared_chunks
from primus_bridge.data.sources.row import Row
from primus_bridge.data.tokenize import Encoder
from primus_bridge.launch.signals import asked_to_end
from tests.data import families

ROWS = 24 * CHUNK_ROWS


def rows(kind: str, folder: Path) -> Iterator[PlacedRow]:
    """The signals come when the workers have just been spawned, or when they work."""
    for number in range(ROWS):
        if number == (20 if kind in ("working", "rank_killed") else 5) * CHUNK_ROWS:
            workers = multiprocessing.active_children()
            print(f"{len(workers)} workers", flush=True)
            (folder / "workers").write_text(" ".join(str(worker.pid) for worker in workers))
            if kind in ("spawning", "working"):
                os.killpg(0, signal.SIGUSR1)
                os.killpg(0, signal.SIGTERM)
            else:
                os.kill(os.getpid() if kind == "rank_killed" else int(workers[0].pid or 0), signal.SIGKILL)
        yield PlacedRow(Row({"text": f"row {number}"}, number + 1, f"rows:{number}"), number, "train")


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    preparation = Preparation(0, Format("alpaca", alpaca), None, Encoder(families.qwen()), 64, "right")

    def work() -> int:
        with asked_to_end() as asked:
            chunks = prepared_chunks(rows(sys.argv[1], Path(sys.argv[2])), preparation, 2)
            count = sum(len(chunk["train"].ids) for chunk in chunks)
            print(f"{count} samples, {asked()}")
        return 0

    sys.exit(guarded(work))
