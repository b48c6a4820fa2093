"""A real Slurm on this machine: munged, slurmctld and two slurmd, in a temporary folder, ended with the session."""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.command import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")

REQUEUE_SECONDS = 8
"""How long a requeued job waits: as long as a credential of its first start is valid. Slurm's default is 120."""

# Debian keeps daemons where a user's PATH does not look
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_seconds}
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Its commands, in the environment that the tests set."""

    def said(self, *words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    def sbatch(self, script: str, *after: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """Submit examples/slurm/SCRIPT; the job's id."""
        words = ["sbatch", "--parsable", *options, str(ROOT / "examples/slurm" / script), *after]
        environment = {**os.environ, "PYTHON": sys.executable, **variables}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def shown(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``."""
        fields = self.said("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.split("=", 1)[1] for field in fields if field.startswith(f"{name}="))

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what} has not come; the queue:\n{self.said('squeue', '--long')}"
            time.sleep(0.2)

    def ends(self, job: str) -> str:
        """Wait for the job's end; its state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.shown(job, "JobState") in ended, f"the end of job {job}")
        return self.shown(job, "JobState")

    def requeued(self, job: str) -> bool:
        return self.shown(job, "Restarts") == "1" and self.shown(job, "JobState") == "PENDING"


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not installed (apt-get install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))  # short: a socket's path has a limit
    folder.chmod(0o755)
    daemons: list[subprocess.Popen] = []
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv("PATH", PATH)
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
                patch.delenv(name)
            _start(folder, daemons)
            yield Slurm()
        finally:
            _stop(daemons)
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Below those that the system gives to connections, and those that jobs take (from 20000)."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(12000, 20000)))
            return probe.getsockname()[1]


def _start(folder: Path, daemons: list[subprocess.Popen]) -> None:
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 State=UNKNOWN"
        for name in NODES
    )
    text = CONF.format(
        folder=folder, host=host, port=free_port(), user=getpass.getuser(), nodes=nodes, requeue_seconds=REQUEUE_SECONDS
    )
    (folder / "slurm.conf").write_text(text)
    munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    words = [f"--{option}={folder / name}" for option, name in munge.items()]
    daemons.append(_daemon(folder, "munged", "--foreground", "--force", *words))
    _until(folder, lambda: (folder / "munge.socket").exists())
    daemons.append(_daemon(folder, "slurmctld", "-D", "-c"))
    for name in NODES:
        (folder / name).mkdir()
        daemons.append(_daemon(folder, "slurmd", "-D", "-N", name))
    _until(folder, lambda: _idle() == len(NODES))


def _daemon(folder: Path, *words: str) -> subprocess.Popen:
    output = (folder / f"{words[0]}.out").open("a")
    # a session of its own: Ctrl-C in the tests is not for it
    return subprocess.Popen(
        words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_the_tests
    )


def _die_with_the_tests() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _idle() -> int:
    done = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%T"], capture_output=True, text=True)
    return done.stdout.split().count("idle")


def _until(folder: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        logs = "\n".join(path.read_text() for path in [*folder.glob("*.log"), *folder.glob("*.out")])
        assert time.monotonic() < deadline, f"Slurm does not start:\n{logs}"
        time.sleep(0.1)


def _stop(daemons: list[subprocess.Popen]) -> None:
    """Jobs first: their steps are no children of slurmd."""
    user = getpass.getuser()
    for options in ([], ["--signal=KILL", "--full"]):
        subprocess.run(["scancel", "--user", user, *options], capture_output=True)
        deadline = time.monotonic() + 15
        while subprocess.run(["squeue", "--noheader"], capture_output=True).stdout and time.monotonic() < deadline:
            time.sleep(0.1)
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
