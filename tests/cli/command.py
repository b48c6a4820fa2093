"""The real command and what it printed: ``run`` in a process of its own, ``in_rank`` as a rank of harness.py's jobs.

Where the process is not the subject, a test calls ``main`` itself: a start of Python and torch takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "PRIMUS_BRIDGE_ERROR_DIR")
MEETING = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
"""Where the ranks of a job meet."""


@dataclass
class Result:
    code: int
    out: str
    err: str


def run(*words: str, cwd=None, module: str = "primus_bridge.cli.main", env=None, timeout: float = 120) -> Result:
    """The command's exit code, stdout and stderr; ``env`` adds variables."""
    variables = {name: value for name, value in os.environ.items() if name not in JOB}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), variables.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    variables.update(env or {})
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
    )
    return Result(done.returncode, done.stdout, done.stderr)


def torchrun(*words: str, module: str = "primus_bridge.cli.main", **options) -> Result:
    """``run`` on two ranks of torchrun, at any free port."""
    return run("--standalone", "--nproc-per-node", "2", "-m", module, *words, module="torch.distributed.run", **options)


def in_rank(words: list[str], without: tuple[str, ...] = ()) -> Result:
    """The command in this rank of ``run_distributed``; ``without``: variables that are unset."""
    from primus_bridge.cli.main import main

    for name in without:
        del os.environ[name]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    return Result(code, out.getvalue(), err.getvalue())
