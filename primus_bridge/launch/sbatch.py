"""A job of ``primus submit`` on Slurm: what its batch script adds to NeMo-Run's, and how it ended."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from primus_bridge.checkpoint.manifest import TRACKER
from primus_bridge.errors import ConfigError
from primus_bridge.launch.signals import STOPPED_FILE, read_stopped

POLL_SECONDS = 10.0

PATIENCE_SECONDS = 300.0
"""How long squeue may fail before waiting ends: a controller that restarts answers nobody for a while."""

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

    def check(self) -> None:
        """Raises ConfigError for a time limit within the grace, and for names that NeMo-Run's script would break."""
        limit = seconds_of(self.time) if self.time is not None else None
        if self.grace and limit is not None and limit <= self.grace:
            raise ConfigError(
                f"--time {self.time} is not longer than --grace {self.grace} (seconds ahead of it at which the run "
                "saves and ends): give more time, or --grace 0"
            )
        own = [("the job's folder (see --job_dir)", str(self.folder))]
        others: list[tuple[str, str]] = []
        if self.container_image is not None:
            own.append(("the working directory, which is mounted in the container,", str(self.directory)))
            others = [("--container_image", self.container_image)]
            others += [("--container_mounts", mount) for mount in self.container_mounts]
        # a % in the folder would be one of Slurm's patterns, a : would part two mounts
        for allowed, named in ((r"[\w./=@+-]+", own), (r"[\w./:=@%+#-]+", others)):
            for what, text in named:
                if not re.fullmatch(allowed, text):
                    raise ConfigError(
                        f"{what} is '{text}': a batch script takes letters, digits and {allowed[3:-3]}- only"
                    )


def task_script(job: SlurmJob) -> str:
    """What every task of the job runs: one rank, in the folder the job was submitted from."""
    config = f'{shlex.quote(str(job.folder))}/"{job.config(POINT).name}"'
    train = f"{shlex.quote(job.python)} -m primus_bridge.cli.main train --framework megatron_bridge"
    return f"cd {shlex.quote(str(job.directory))}\nexec {train} --config {config}\n"


REQUEUE = """\
    # SIGUSR1 ahead of the time limit made the run save and end: it goes on when this job is requeued
    if grep -qs SIGUSR1 "$STOPPED"; then
        if [ "$(cat "$TRACKER" 2>/dev/null)" = "$began" ]; then
            echo "not requeued: this start has saved no new step, so the next one would not either"
            code=1
        elif scontrol requeue "$SLURM_JOB_ID"; then
            exit 0
        fi
    fi
"""


def setup_lines(job: SlurmJob) -> str:
    """Bash for the batch script, before the ranks start: environment, requeue after SIGUSR1, and the exit code."""
    saves = " ".join(shlex.quote(str(save)) for save in job.saves)
    requeue = REQUEUE if job.grace else ""
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.env.items())
    folder = shlex.quote(str(job.folder))
    return f"""
{exports}SAVES=({saves})
STOPPED="${{SAVES[{POINT}]}}/{STOPPED_FILE}"
TRACKER="${{SAVES[{POINT}]}}/{TRACKER}"
EXIT_CODE={folder}/"{job.exit_code(POINT).name}"
rm -f "$STOPPED" "$EXIT_CODE"
began=$(cat "$TRACKER" 2>/dev/null)
ended() {{
    code=$?
{requeue}    echo "$code" > "$EXIT_CODE"
    exit "$code"
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
    Slurm's accounting, which many clusters do not have, is not asked. Raises ConfigError when squeue fails for
    PATIENCE_SECONDS.
    """
    answered = time.monotonic()
    while True:
        try:
            if not _is_queued(job_id):
                break
            answered = time.monotonic()
        except ConfigError:
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise
        time.sleep(POLL_SECONDS)
    return [_failure(job, job_id, point) for point in range(len(job.saves))]


def _is_queued(job_id: str) -> bool:
    """Whether a part of the job is pending, running or completing."""
    # not by its id: squeue answers with an error for a job it has forgotten
    queue = requested(["squeue", "--me", "--noheader", "--format=%i"])
    return any(line.split("_")[0] == job_id for line in queue.split())


def seconds_of(limit: str) -> Optional[int]:
    """sbatch's --time: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; None for no limit, or another form."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit.strip())
    if found is None:
        return None
    days, *given = found.groups()
    parts = [int(part) for part in given if part is not None]
    # with days the first is hours; without, one or two of them begin with minutes
    hours, minutes, seconds = [*parts, 0, 0][:3] if days or len(parts) == 3 else [0, *parts, 0][:3]
    return (int(days or 0) * 24 * 3600 + hours * 3600 + minutes * 60 + seconds) or None


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
