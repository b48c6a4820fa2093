"""When a batch script requeues its job, and how ``primus submit --wait`` sees the end: with stand-ins for Slurm's own
commands, where a real Slurm would be too slow to ask."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from primus_bridge.errors import ConfigError
from primus_bridge.launch import sbatch
from primus_bridge.launch.sbatch import SlurmJob, seconds_of, setup_lines
from tests.cli.command import ROOT

RUN = """\
mkdir -p "$RUN_SAVE"
[ -z "$STOPPED_BY" ] || echo "$STOPPED_BY received at step 7 of 20" > "$RUN_SAVE/stopped"
[ -z "$REACHED" ] || printf "$REACHED" > "$RUN_SAVE/latest_checkpointed_iteration.txt"
exit "$RUN_CODE"
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """commands(name, body): a program of that name first on the PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, body: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}")
        path.chmod(0o755)

    return write


def submitted(job: SlurmJob) -> str:
    """The part of primus submit's script that decides."""
    return f"set +e\n{setup_lines(job)}\nsrun\nexit $?\n"


def example(name: str) -> str:
    return (ROOT / "examples/slurm" / name).read_text()


CASES = [
    # before, reached, signal, exit code of the run -> requeued, exit code of the job
    ("", "7", "SIGUSR1", 0, True, 0),
    ("3", "7", "SIGUSR1", 0, True, 0),
    ("", "", "SIGUSR1", 0, False, 1),
    ("7", "7", "SIGUSR1", 0, False, 1),
    ("3", "7", "SIGTERM", 0, False, 0),
    ("3", "20", "", 0, False, 0),
    ("3", "7", "", 5, False, 5),
]


@pytest.mark.parametrize("script", ["submit", "sft_single_node.sbatch", "sft_multi_node.sbatch", "lora.sbatch"])
def test_requeued_only_when_this_start_has_come_on(tmp_path, commands, script):
    commands("srun", RUN)
    commands("scontrol", f'[ "$1" != requeue ] || echo "$2" >> {tmp_path}/requeued\n')
    job = SlurmJob("run", tmp_path / "job", [tmp_path / "save"], "python", tmp_path)
    job.folder.mkdir()
    for before, reached, by, run_code, requeued, code in CASES:
        save = tmp_path / "save"
        save.mkdir(exist_ok=True)
        tracker = save / "latest_checkpointed_iteration.txt"
        tracker.unlink(missing_ok=True)
        if before:
            tracker.write_text(before)
        (tmp_path / "requeued").unlink(missing_ok=True)
        variables = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "a", "SLURM_NNODES": "1", "SAVE": str(save)}
        run = {"RUN_SAVE": str(save), "REACHED": reached, "STOPPED_BY": by, "RUN_CODE": str(run_code)}
        text = submitted(job) if script == "submit" else example(script)
        done = subprocess.run(
            ["bash"], input=text, env={**os.environ, **variables, **run}, cwd=tmp_path, capture_output=True, text=True
        )
        case = (before, reached, by)
        assert (done.returncode, (tmp_path / "requeued").exists()) == (code, requeued), (case, done.stderr)
        assert ("not requeued" in done.stdout + done.stderr) == (by == "SIGUSR1" and not requeued), case
        if script == "submit":
            assert job.exit_code(0).exists() != requeued and (requeued or job.exit_code(0).read_text() == f"{code}\n")


def test_without_grace_nothing_is_requeued(tmp_path):
    job = SlurmJob("run", tmp_path, [tmp_path / "save"], "python", tmp_path, grace=0)
    assert "requeue" not in setup_lines(job)


def test_time_limits():
    minutes = {"90": 90, "1:30": 1.5, "02:00:00": 120, "1-0": 1440, "1-02:30": 1590, "1-02:30:30": 1590.5}
    assert {limit: seconds_of(limit) for limit in minutes} == {limit: value * 60 for limit, value in minutes.items()}
    assert [seconds_of(limit) for limit in ("0", "UNLIMITED", "soon")] == [None, None, None]


def test_waiting_outlives_a_queue_that_does_not_answer(tmp_path, commands, monkeypatch):
    """Twice no answer, then another job of the user's too, then only that one."""
    job = SlurmJob("run", tmp_path, [tmp_path / "save"], "python", Path.cwd())
    job.exit_code(0).write_text("0\n")
    commands(
        "squeue",
        f'echo "$*" >> {tmp_path}/asked\n'
        f'case $(wc -l < {tmp_path}/asked) in\n  1|2) echo "Unable to contact slurm controller" >&2; exit 1;;\n'
        "  3) echo 17_[0-3%2]; echo 8;;\n  4) echo 17_3;;\n  *) echo 8;;\nesac\n",
    )
    monkeypatch.setattr(sbatch, "POLL_SECONDS", 0.01)
    assert sbatch.wait(job, "17") == [None]
    assert (tmp_path / "asked").read_text() == "--me --noheader --format=%i\n" * 5
    commands("squeue", 'echo "Unable to contact slurm controller" >&2; exit 1\n')
    monkeypatch.setattr(sbatch, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(ConfigError, match="squeue: Unable to contact"):
        sbatch.wait(job, "17")
