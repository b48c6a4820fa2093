"""Worker processes that tokenise: a signal to the whole process group is the rank's to answer; no worker is left."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.command import ROOT
from tests.launch.tokenising import ROWS


@pytest.mark.parametrize(
    "kind, code, said",
    [
        ("spawning", 0, f"{ROWS} samples, SIGUSR1 received"),
        ("working", 0, f"{ROWS} samples, SIGUSR1 received"),
        ("worker_killed", 2, "one of the 2 processes that tokenise ended (out of memory?)"),
        ("rank_killed", -9, "2 workers"),
    ],
)
def test_signals_while_data_is_tokenised(tmp_path, kind, code, said):
    words = [sys.executable, "-m", "tests.launch.tokenising", kind, str(tmp_path)]
    with (tmp_path / "out").open("w") as out:  # no pipe, which a worker that is left would hold open
        done = subprocess.run(words, cwd=ROOT, stdout=out, stderr=out, timeout=60, start_new_session=True)
    text = (tmp_path / "out").read_text()
    assert done.returncode == code and said in text, text
    # after SIGKILL the tracker of its semaphores rightly complains
    assert "Traceback" not in text and (kind == "rank_killed" or "resource_tracker" not in text)
    workers = [Path("/proc") / pid for pid in (tmp_path / "workers").read_text().split()]
    deadline = time.monotonic() + 10
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.1)
