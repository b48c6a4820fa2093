"""A job of ``primus submit`` on Slurm: what its batch script adds to NeMo-Run's, and how it ended."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from primus_bridge.errors import ConfigError
from primus_bridge.launch.signals import STOPPED_FILE, read_stopped

POLL_SECONDS = 2.0

POINT = "${SLURM_ARRAY_TASK_ID:-0}"
"""In a shell: which point of a sweep this job is; 0 without a sweep."""


@dataclass(frozen=True)
class SlurmJob:
    """One submission: a run, or a grid of runs as an array.

    folder: its configs (config_0.yaml, ...), logs and exit codes. saves: the save folder of each point. python: the
    interpreter on the nodes or in the container. grace: seconds ahead of the time limit at which the run saves and the
    job goes back into the queue; 0 is never.
    """

    name: str
    folder: Path
    saves: list[Path]
    python: str
    directory: Path
    nodes: int = 1
    ntasks_per_node: int = 1
    gpus_per_node: Optional[int] = None
    account: Optional[str] = None
    partition: Optional[str] = None
    time: Optional[str] = None
    container_image: Optional[str] = None
    container_mounts: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    dependency: Optional[str] = None
    max_parallel: Optional[int] = None
    grace: int = 120

    @property
    def array(self) -> Optional[str]:
        """sbatch's --array of a grid: '0-3%2'."""
        if len(self.saves) == 1:
            return None
        return f"0-{len(self.saves) - 1}" + (f"%{self.max_parallel}" if self.max_parallel else "")

    def log(self, point: int | str) -> Path:
        return self.folder / f"log_{point}.out"

    def exit_code(self, point: int | str) -> Path:
        return self.folder / f"exit_code_{point}"

    def config(self, point: int | str) -> Path:
        return self.folder / f"config_{point}.yaml"


def task_script(job: SlurmJob) -> str:
    """What every task of the job runs: one rank, in the folder the job was submitted from."""
    config = f'{shlex.quote(str(job.folder))}/"{job.config(POINT).name}"'
    train = f"{shlex.quote(job.python)} -m primus_bridge.cli.main train --framework megatron_bridge"
    return f"cd {shlex.quote(str(job.directory))}\nexec {train} --config {config}\n"


def setup_lines(job: SlurmJob) -> str:
    """Bash for the batch script, before the ranks start: environment, requeue after SIGUSR1, and the exit code."""
    saves = " ".join(shlex.quote(str(save)) for save in job.saves)
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.env.items())
    folder = shlex.quote(str(job.folder))
    return f"""
{exports}SAVES=({saves})
STOPPED="${{SAVES[{POINT}]}}/{STOPPED_FILE}"
EXIT_CODE={folder}/"{job.exit_code(POINT).name}"
rm -f "$STOPPED" "$EXIT_CODE"
# SIGUSR1 ahead of the time limit made the run save and end: it goes on when this job is requeued
ended() {{
    code=$?
    if grep -qs SIGUSR1 "$STOPPED" && scontrol requeue "$SLURM_JOB_ID"; then
        exit 0
    fi
    echo "$code" > "$EXIT_CODE"
}}
trap ended EXIT
# Slurm's SIGTERM reaches the ranks too: this script waits until they have saved
trap : TERM
"""


def requested(words: list[str]) -> str:
    """stdout of a Slurm command. Raises ConfigError where there is no Slurm, or it refuses."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"there is no {words[0]} on this machine: submit from a node of the cluster") from None
    if done.returncode:
        raise ConfigError(f"{words[0]}: {done.stderr.strip()}")
    return done.stdout


def wait(job: SlurmJob, job_id: str) -> list[Optional[str]]:
    """When all points have ended: for each, why it is not finished, or None.

    The queue says when (a job that is requeued stays in it); the exit codes that the scripts leave say how, so that
    Slurm's accounting, which many clusters do not have, is not asked.
    """
    while job_id in _queued(job_id):
        time.sleep(POLL_SECONDS)
    return [_failure(job, job_id, point) for point in range(len(job.saves))]


def _queued(job_id: str) -> set[str]:
    """The job's id as long as a part of it is pending, running or completing."""
    # the whole queue: squeue answers with an error for a job it has forgotten
    return {line.split("_")[0] for line in requested(["squeue", "--noheader", "--format=%i"]).split()} & {job_id}


def _failure(job: SlurmJob, job_id: str, point: int) -> Optional[str]:
    path = job.exit_code(point)
    code = path.read_text(encoding="utf-8").strip() if path.is_file() else None
    if (stopped := read_stopped(job.saves[point])) is not None:
        return f"stopped: {stopped}"
    if code is None:
        return f"ended without an exit code{_last_state(job, job_id, point)}"
    return f"failed with exit code {code}" if code != "0" else None


def _last_state(job: SlurmJob, job_id: str, point: int) -> str:
    """' (TIMEOUT)': what Slurm still knows of a job whose script was killed; '' when it has forgotten."""
    name = f"{job_id}_{point}" if job.array else job_id
    shown = subprocess.run(["scontrol", "show", "job", name], capture_output=True, text=True, check=False).stdout
    found = re.search(r"JobState=(\w+)", shown)
    return f" ({found.group(1)})" if found else ""
