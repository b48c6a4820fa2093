"""A life: one start of a run that may be killed, by the real command or on ranks forked from a server with torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

import psutil

from tests.cli.command import JOB, ROOT
from tests.distributed.harness import meeting_point

OTHERS_SECONDS = 10.0
"""How long ranks may take to end by themselves after another was killed, before their launcher ends them."""

END_SECONDS = 30.0
"""How long everything of a killed life may take to be gone."""

ENDED_BY_LAUNCHER = 3
"""Exit code of a forked life some of whose ranks did not end by themselves."""

_context = multiprocessing.get_context("forkserver")


def use_fork_server() -> None:
    """Before the first forked life: the server imports what ranks need, once."""
    _context.set_forkserver_preload(["tests.reliability.preload"])


def _environment(cache: Path) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in JOB}
    return variables | {
        "PYTHONPATH": str(ROOT),
        "PRIMUS_BRIDGE_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        # the same number of threads in every life: sums are the same to the bit
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Life:
    """A run that was just started: ``words`` is its command after ``primus``, ``log`` takes what it prints.

    forked: from the fork server, else the real command in a process of its own.
    """

    def __init__(self, words: list[str], nproc: int, log: Path, cache: Path, forked: bool):
        self.forked, self.nproc, self.log = forked, nproc, log
        self.started = time.time()
        environment = _environment(cache)
        if forked:
            self._store, variables = meeting_point()
            environment |= variables
            self._process: Any = _context.Process(
                target=_launcher, args=(words, nproc, str(log), os.getcwd(), environment)
            )
            self._process.start()
        else:
            command = [sys.executable, "-m", "primus_bridge.cli.main", *words, "--nproc", str(nproc)]
            with log.open("wb") as output:
                self._process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    @property
    def code(self) -> Optional[int]:
        """The launcher's exit code; None while it lives."""
        return self._process.exitcode if self.forked else self._process.poll()

    @property
    def says(self) -> str:
        """What it has printed by now."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def _everybody(self) -> list[psutil.Process]:
        """The launcher, its ranks and their own processes."""
        try:
            launcher = psutil.Process(self._process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _ranks(self, everybody: list[psutil.Process]) -> list[psutil.Process]:
        launcher = self._process.pid
        if self.forked:
            return [process for process in everybody if process.ppid() == launcher]
        if self.nproc == 1:
            return everybody[:1]
        return [process for process in everybody if "primus_bridge.launch.rank" in process.cmdline()]

    def kill(self, whom: str, choose: Any) -> tuple[str, list[psutil.Process]]:
        """SIGKILL to one rank, all ranks or the launcher; who it was, and everybody there was.

        choose: picks one of several ranks. Before there are ranks it is the launcher that dies.
        """
        everybody = self._everybody()
        try:
            ranks = self._ranks(everybody)
        except psutil.NoSuchProcess:
            ranks = []
        if not everybody:
            return whom, []
        if whom == "launcher" or not ranks:
            whom, victims = "launcher", everybody[:1]
        else:
            victims = [choose(ranks)] if whom == "rank" else ranks
        for victim in victims:
            try:
                victim.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        return whom, everybody

    def wait(self, seconds: float) -> None:
        """Until the launcher is gone. Raises TimeoutError."""
        if self.forked:
            self._process.join(seconds)
        else:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        if self.code is None:
            raise TimeoutError(f"it has not ended within {seconds:.0f} s")

    def end(self) -> None:
        """Kill all that is left."""
        for process in reversed(self._everybody()):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.wait(END_SECONDS)


def survivors(everybody: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still live after ``seconds``; returns as soon as nobody does."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in everybody if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def describe(process: psutil.Process) -> str:
    """For a fault: what it is and where in the kernel it waits."""
    try:
        waits = Path(f"/proc/{process.pid}/wchan").read_text(encoding="utf-8")
        return f"{process.pid} of {process.ppid()} ({process.status()}, {waits}): {' '.join(process.cmdline())}"
    except (psutil.NoSuchProcess, OSError) as error:
        return f"{process.pid} ({error})"


def _lives(process: psutil.Process) -> bool:
    try:
        # one that nobody waits for stays a zombie
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _launcher(words: list[str], nproc: int, log: str, folder: str, environment: dict[str, str]) -> None:
    """In a process of the fork server: fork the ranks, wait for them, end with their exit code."""
    from primus_bridge.config import load_arguments
    from primus_bridge.launch.entry import payload
    from primus_bridge.launch.local import LAUNCHER_PID

    # the fork server has those of the life that came first
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.update(
        {LAUNCHER_PID: str(os.getpid())},
        WORLD_SIZE=str(nproc),
        LOCAL_WORLD_SIZE=str(nproc),
    )
    job = payload(load_arguments(None, words[1:]))
    ranks = []
    for rank in range(nproc):
        if not (pid := os.fork()):
            _rank(rank, job)
        ranks.append(pid)
    os._exit(_reap(set(ranks)))


def _rank(rank: int, job: dict[str, Any]) -> None:
    """Never returns."""
    code = 1
    try:
        import torch

        from primus_bridge.launch.entry import run_training
        from primus_bridge.launch.rank import in_rank

        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        in_rank(run_training, *job.values())
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _reap(ranks: set[int]) -> int:
    """Wait for all; after the first failure the others may take OTHERS_SECONDS to end by themselves."""
    code, deadline = 0, float("inf")
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > deadline:
                for rank in ranks:
                    os.kill(rank, signal.SIGKILL)
                code, deadline = ENDED_BY_LAUNCHER, float("inf")
            time.sleep(0.005)
            continue
        ranks.discard(pid)
        if status:
            deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
            code = code or 1
    return code
