"""The job this process belongs to, torchrun's variables or Slurm's translated to them, and the device it uses."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from typing import Mapping, MutableMapping, Optional

from primus_bridge.errors import ConfigError

LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Where other launchers say a rank's place on its node."""


def quiet_torch() -> None:
    """Leave out what torch's C++ says to its own developers (NNPACK, c10d, allocator); before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


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
    elif "SLURM_PROCID" in environment and _number(_tasks(environment), "SLURM_NTASKS") > 1:
        if _is_batch_script(environment):
            return False
        for name, value in slurm_variables(environment).items():
            environment.setdefault(name, value)
    else:
        return False
    _check_job(environment)
    return True


def _check_job(environment: MutableMapping[str, str]) -> None:
    """Raises ConfigError for variables with which the ranks would never meet; a world of one needs no master."""
    rank, size = (_number(environment[name], name) for name in ("RANK", "WORLD_SIZE"))
    _number(environment["LOCAL_RANK"], "LOCAL_RANK")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {size}: ranks count from 0 to WORLD_SIZE - 1")
    if size == 1:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", "0")  # any free one
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set but {' and '.join(missing)} not: start the ranks with torchrun or srun, "
            "or unset RANK and WORLD_SIZE"
        )
    if not 0 <= _number(environment["MASTER_PORT"], "MASTER_PORT") < 2**16:
        raise ConfigError(f"MASTER_PORT is {environment['MASTER_PORT']}: ports go to 65535")


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is '{text}', which is no number") from None


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

    The master is the step's first host; the port comes from the job's id and the step's, so that every task computes
    the same one and two jobs on a host seldom meet. Raises ConfigError when Slurm's own variables are missing.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environment[name] for name in names if environment.get(name)), None)
    master = environment.get("MASTER_ADDR") or (address(first_host(nodes)) if nodes else None)
    if master is None:
        raise ConfigError("SLURM_PROCID is set but SLURM_JOB_NODELIST is not: start the run with srun inside a job")
    job, step = (_number(environment.get(name, "0"), name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
    node = _number(environment.get("SLURM_NODEID", "0"), "SLURM_NODEID")
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": _tasks(environment),
        "LOCAL_WORLD_SIZE": str(tasks_of_node(tasks_per_node, node)),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(20000 + (job + 7 * step) % 12000),  # below the ports that Linux gives to anybody
    }


def tasks_of_node(tasks_per_node: str, node: int) -> int:
    """'4(x2),2' -> 4, 4, 2 for the nodes 0, 1, 2."""
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node)
        for _ in range(int(times or "1"))
    ]
    return counts[node] if node < len(counts) else 1


def address(host: str) -> str:
    """``host``, or where that is a name of Slurm's own, which no resolver knows, the address Slurm has for it."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        with contextlib.suppress(OSError):  # no scontrol, as in a container
            node = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False)
            if found := re.search(r"\bNodeAddr=(\S+)", node.stdout):
                return found.group(1)
    return host


def first_host(nodes: str) -> str:
    """'gpu[003-005,9],login' -> 'gpu003'; scontrol is asked for forms beyond one bracket."""
    head = re.match(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)*", nodes)
    if head is None or nodes[head.end() : head.end() + 1] not in ("", ","):
        raise ConfigError(f"cannot read the Slurm node list '{nodes}'")
    name = head.group(0)
    if name.count("[") > 1:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return hosts.stdout.split()[0]
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", name)
    if not re.fullmatch(r"[\w.-]+", host):
        raise ConfigError(f"cannot read the Slurm node list '{nodes}'")
    return host
