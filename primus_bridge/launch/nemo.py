"""NeMo-Run: the only file that imports nemo_run. A job's script, its submission to Slurm, and runs on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_run
import psutil
from nemo_run.core.execution.slurm import SlurmJobDetails

from primus_bridge.errors import ConfigError
from primus_bridge.launch.sbatch import POINT, SlurmJob, setup_lines, task_script
from primus_bridge.launch.signals import ASKING


@dataclass(kw_only=True)
class _Logs(SlurmJobDetails):
    """A log a point, continued when the job is requeued."""

    @property
    def srun_stdout(self) -> Path:
        assert self.folder
        return Path(self.folder) / f"log_{POINT}.out"


def slurm_script(job: SlurmJob) -> str:
    """The batch script of the job and what its tasks run, as ``submit`` would send them; nothing is left on disk."""
    with tempfile.TemporaryDirectory() as temporary, _experiment(job, Path(temporary)) as experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
        (script,) = Path(temporary).rglob("*_sbatch.sh")
        batch = script.read_text(encoding="utf-8").replace(temporary, str(job.folder))
    task = "".join(f"#   {line}\n" for line in task_script(job).splitlines())
    return f"{batch.rstrip()}\n\n# what each task runs; its script and config are written at submission:\n{task}"


def submit(job: SlurmJob) -> str:
    """Submit to the Slurm of this machine; the job's id. Its folder, with the configs, is there already.

    Raises ConfigError with Slurm's own words when it refuses.
    """
    with _experiment(job, job.folder) as experiment:
        try:
            experiment.run(detach=True)
        except Exception as error:  # invoke's, with sbatch's answer in it
            said = getattr(getattr(error, "result", None), "stderr", "").strip()
            if not said:
                raise
            raise ConfigError(f"Slurm refuses the job: {said}") from None
        (status,) = experiment.status(return_dict=True).values()
    return status["job_id"]


def run_here(name: str, folder: Path, config: Path, env: dict[str, str]) -> tuple[bool, bool]:
    """Run a config on this machine: (whether it succeeded, whether a signal asked it to end).

    What the run prints goes to this terminal and to logs below folder. Raises KeyboardInterrupt after Ctrl-C.
    """
    words = ["train", "--framework", "megatron_bridge", "--config", str(config)]
    script = nemo_run.Script("primus_bridge.cli.main", entrypoint=sys.executable, m=True, args=words)
    executor = nemo_run.LocalExecutor(env_vars=env)
    with _quiet(), _signals_to(str(config)) as received:
        with nemo_run.Experiment(name, executor, base_dir=str(folder), **_SILENT) as experiment:
            experiment.add(script, name=name, tail_logs=True)
            experiment.run()
        (job,) = experiment.jobs
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    return job.state.name == "SUCCEEDED", bool(received)


@contextmanager
def _signals_to(word: str) -> Iterator[list[int]]:
    """Inside, signals go to the children of this process that have ``word`` on their command line; those received.

    NeMo-Run itself would wait for the job all the same, which is in a session of its own.
    """
    received: list[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        received.append(number)
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if word in child.cmdline():
                    child.send_signal(number)

    numbers = (signal.SIGINT, *ASKING) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SILENT = {"clean_mode": True, "enable_goodbye_message": False, "skip_status_at_exit": True, "log_level": "ERROR"}


@contextmanager
def _experiment(job: SlurmJob, base: Path) -> Iterator[nemo_run.Experiment]:
    """The job as an experiment of one task, whose files are below base."""
    mounts = job.container_mounts
    if job.container_image is not None:
        mounts = [*mounts, *(f"{path}:{path}" for path in (job.directory, job.folder))]
    executor = nemo_run.SlurmExecutor(
        account=job.account,
        partition=job.partition,
        time=job.time,
        nodes=job.nodes,
        ntasks_per_node=job.ntasks_per_node,
        gpus_per_node=job.gpus_per_node,
        array=job.array,
        signal=f"USR1@{job.grace}" if job.grace else None,
        container_image=job.container_image,
        container_mounts=mounts,
        srun_args=["--open-mode=append"],
        additional_parameters=(
            {"dependency": job.dependency, "kill_on_invalid_dep": "yes"} if job.dependency is not None else None
        ),
        setup_lines=setup_lines(job),
        job_details=_Logs(job_name=job.name, folder=str(job.folder)),
        job_name_prefix="primus-",  # or an account is asked for
        tunnel=nemo_run.LocalTunnel(job_dir=str(base / "experiments")),
        packager=nemo_run.Packager(),
        poll_estimated_start_time=False,
    )
    with _quiet(), nemo_run.Experiment(job.name, executor, base_dir=str(base), **_SILENT) as experiment:
        experiment.add(nemo_run.Script(inline=task_script(job)), name=job.name)
        yield experiment


@contextmanager
def _quiet() -> Iterator[None]:
    """NeMo-Run's own log lines left out; what goes wrong is raised. Its shell would read our standard input."""
    logging.disable(logging.WARNING)
    before = sys.stdin
    try:
        with open(os.devnull) as nothing:
            sys.stdin = nothing
            yield
    finally:
        sys.stdin = before
        logging.disable(logging.NOTSET)
