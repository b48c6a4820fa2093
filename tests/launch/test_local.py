"""Local ranks: one in the process, several through torch's launcher, and how each failure ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from primus_bridge.cli.main import guarded
from primus_bridge.config import load_arguments
from primus_bridge.errors import ConfigError
from primus_bridge.launch.local import launch, ranks_for
from tests.cli.command import ROOT, Result, run


@pytest.fixture
def job(tmp_path, capfd, monkeypatch):
    """job(kind): two ranks launched from this process; what the command would end with and print."""
    monkeypatch.chdir(ROOT)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def job(kind: str) -> Result:
        capfd.readouterr()
        code = guarded(lambda: launch("tests.launch.jobs:meet", {"kind": kind, "folder": str(tmp_path)}, 2))
        # Ctrl-C is again this process's own
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        return Result(code, *capfd.readouterr())

    return job


def alive(folder: Path) -> list[int]:
    """Those of the ranks' processes that still run."""
    running = []
    for path in folder.glob("rank*"):
        pid = int(path.read_text().split()[0])
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            running.append(pid)
    return running


def test_one_rank_runs_in_this_process_and_leaves_the_environment(tmp_path):
    before = dict(os.environ)
    assert launch("tests.launch.jobs:environment", {"folder": str(tmp_path)}, 1) == 0
    words = (tmp_path / "single").read_text().split()
    assert words[0] == str(os.getpid())
    assert words[1:5] == ["RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1"]
    with pytest.raises(ConfigError, match="rows.json: the data set is empty"):
        launch("tests.launch.jobs:refuse", {"folder": str(tmp_path)}, 1)
    assert dict(os.environ) == before


def test_two_ranks_meet_and_share_the_cores(tmp_path):
    result = run("meet", "fine", str(tmp_path), "2", module="tests.launch.jobs", cwd=ROOT)
    assert (result.code, result.err, result.out) == (0, "", "")
    for rank in (0, 1):
        _, total, *variables = (tmp_path / f"rank{rank}").read_text().split()
        values = dict(variable.split("=") for variable in variables)
        assert total == "3"
        assert (values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        if "OMP_NUM_THREADS" not in os.environ:
            assert values["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


@pytest.mark.parametrize("kind", ["refuse", "both_refuse"])
def test_a_refusal_is_said_once(tmp_path, job, kind):
    result = job(kind)
    assert (result.code, result.err) == (2, "primus: rows.json: the data set is empty\n")
    assert alive(tmp_path) == []


@pytest.mark.parametrize("kind", ["crash", "crash_alone"])
def test_a_crash_shows_its_traceback_once(job, kind):
    """Whether the other rank fails on the lost connection or still runs when the launcher ends it."""
    result = job(kind)
    assert result.code == 1
    assert result.err.count("Traceback") == 1
    assert result.err.endswith("RuntimeError: a bug in rank 1\nprimus: rank 1 failed\n")


def test_a_killed_rank_is_named(tmp_path, job):
    result = job("killed")
    assert (result.code, result.err) == (1, "primus: rank 1 was killed by SIGKILL (out of memory?)\n")
    assert alive(tmp_path) == []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_ending_the_launcher_ends_every_rank(tmp_path, number, code):
    launcher = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.jobs", "meet", "wait", str(tmp_path), "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("rank*"))) < 2:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.1)
    time.sleep(0.3)
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert "Traceback" not in err
    deadline = time.monotonic() + 10
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(tmp_path) == []


def test_the_launcher_may_be_process_1(tmp_path):
    """As in a container without an init process."""
    words = [sys.executable, "-m", "tests.launch.jobs", "meet", "fine", str(tmp_path), "2"]
    done = subprocess.run(["unshare", "--fork", "--pid", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    if "unshare failed" in done.stderr:
        pytest.skip("a process namespace of its own needs root")
    assert (done.returncode, done.stderr) == (0, "")


def test_how_many_ranks():
    cpu = ["--dist.device", "cpu", "--global_batch_size", "8"]
    assert ranks_for(load_arguments(None, cpu)) == 1
    layout = ["--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2"]
    assert ranks_for(load_arguments(None, [*cpu, *layout])) == 4
    assert ranks_for(load_arguments(None, [*cpu, *layout, "--nproc", "8"])) == 8
    with pytest.raises(ConfigError, match="6 ranks do not divide"):
        ranks_for(load_arguments(None, [*cpu, *layout, "--nproc", "6"]))
