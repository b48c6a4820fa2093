"""run("train", ...): the real command in a process of its own, and what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "PRIMUS_BRIDGE_ERROR_DIR")


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
