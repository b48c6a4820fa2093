"""The job this process belongs to, torchrun's variables or Slurm's translated to them, and the device it uses."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Mapping, MutableMapping, Optional

from primus_bridge.errors import ConfigError

LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Where other launchers say a rank's place on its node."""


def join_job(environment: MutableMapping[str, str] = os.environ) -> bool:
    """True when this process is a rank of a job somebody else started; its variables are then torchrun's.

    torchrun: RANK and WORLD_SIZE are set. Slurm: SLURM_PROCID is set and the step has several tasks; then RANK,
    LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set here, where they are missing.
    The script of an sbatch job, without srun, is no task of a step: it starts ranks of its own.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if "LOCAL_RANK" not in environment:
            named = (environment.get(name) for name in LOCAL_RANKS)
            environment["LOCAL_RANK"] = next((rank for rank in named if rank is not None), environment["RANK"])
        return True
    if "SLURM_PROCID" in environment and int(_tasks(environment)) > 1 and not _is_batch_script(environment):
        for name, value in slurm_variables(environment).items():
            environment.setdefault(name, value)
        return True
    return False


def choose_device(device: Optional[str]) -> None:
    """ "cpu" hides the GPUs before torch looks for them; "cuda" insists on one; None takes what is there."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    elif device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("device cuda: torch sees no CUDA or ROCm device here; see `primus doctor`")


def _tasks(environment: Mapping[str, str]) -> str:
    """Tasks of this step; those of the whole job where Slurm does not say."""
    return environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")


def _is_batch_script(environment: Mapping[str, str]) -> bool:
    """sbatch's script has SLURM_PROCID 0 and the job's SLURM_NTASKS, but its list of tasks is itself and no step."""
    return environment.get("SLURM_GTIDS") == "0" and "SLURM_STEP_NUM_TASKS" not in environment


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables of a Slurm task.

    The master is the step's first host; the port comes from the job's id, so that every task computes the same one and
    two jobs on a host seldom meet. Raises ConfigError when Slurm's own variables are missing.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError("SLURM_PROCID is set but SLURM_JOB_NODELIST is not: start the run with srun inside a job")
    job = int(environment.get("SLURM_JOB_ID", "0"))
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
    local = re.match(r"\d+", tasks_per_node)
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": _tasks(environment),
        "LOCAL_WORLD_SIZE": local.group(0) if local else "1",
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(20000 + job % 20000),
    }


def first_host(nodes: str) -> str:
    """'gpu[003-005,9],login' -> 'gpu003'; scontrol is asked for forms beyond one bracket."""
    head = re.match(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)*", nodes)
    if head is None:
        raise ConfigError(f"cannot read the Slurm node list '{nodes}'")
    name = head.group(0)
    if name.count("[") > 1:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return hosts.stdout.split()[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name)
