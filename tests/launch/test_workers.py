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
        ("group", 0, f"{ROWS} samples, SIGUSR1 received"),
        ("worker_killed", 2, "one of the 2 processes that tokenise ended (out of memory?)"),
        ("rank_killed", -9, "2 workers"),
    ],
)
def test_signals_while_data_is_tokenised(tmp_path, kind, code, said):
    words = [sys.executable, "-m", "tests.launch.tokenising", kind, str(tmp_path)]
    done = subprocess.run(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, start_new_session=True
    )
    assert done.returncode == code and said in done.stdout, done.stdout
    # after SIGKILL the tracker of its semaphores rightly complains
    assert "Traceback" not in done.stdout and (kind == "rank_killed" or "resource_tracker" not in done.stdout)
    workers = [Path("/proc") / pid for pid in (tmp_path / "workers").read_text().split()]
    deadline = time.monotonic() + 10
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.1)
