"""What memory a rank has: that of a GPU, as given or found without torch, or its share of the host's."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Optional

RESERVED = 0.08
"""Part of a GPU's memory that a plan leaves: the context, communication buffers, fragments between tensors."""
PROCESS_BYTES = 500 * 10**6
"""Of a rank on a CPU: Python, torch and its libraries."""
AMD_MEMORY = "/sys/class/drm/card*/device/mem_info_vram_total"


class Groups(NamedTuple):
    """A version of the kernel's control groups: where they lie, a group's files, and its caches in memory.stat."""

    place: str
    limit: str
    used: str
    caches: tuple[str, ...]


VERSION_1 = Groups(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
VERSION_2 = Groups("sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file"))


@dataclass(frozen=True)
class Device:
    """total: bytes of the rank's device; usable: of them for weights, gradients, optimizer and activations."""

    kind: str
    """"cpu" or "gpu"."""
    total: int
    usable: int
    source: str

    @classmethod
    def gpu(cls, total: int, source: str) -> Device:
        return cls("gpu", total, round(total * (1 - RESERVED)), source)

    @classmethod
    def cpu(cls, ranks: int) -> Device:
        """One of so many ranks that share this host."""
        total = available() // ranks
        return cls("cpu", total, max(total - PROCESS_BYTES, 0), f"this host's free memory over {ranks} ranks")


def find_device(gpu_memory: Optional[int], device: Optional[str], ranks: int) -> Device:
    """gpu_memory: bytes that were given. device: dist.device of the arguments. ranks: of a host without GPUs."""
    if gpu_memory is not None:
        return Device.gpu(gpu_memory, "--gpu_memory")
    memories = [] if device == "cpu" else gpu_memories()
    return Device.gpu(min(memories), "found here") if memories else Device.cpu(ranks)


def gpu_memories() -> list[int]:
    """Bytes of each GPU that a process started here would see; empty without one.

    NVIDIA's by its own tool, AMD's as the kernel says; of them what CUDA_VISIBLE_DEVICES and the like leave.
    """
    program = shutil.which("nvidia-smi")
    if program is not None:
        asked = [program, "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
            rows = [line.split(",") for line in told.splitlines()]
            gpus = [(uuid.strip(), int(size) * 2**20) for uuid, size in rows]
        except (OSError, subprocess.SubprocessError, ValueError):
            return []
        variables = ["CUDA_VISIBLE_DEVICES"]
    else:
        gpus = [("", int(path.read_text())) for path in sorted(Path("/").glob(AMD_MEMORY[1:]))]
        # the second counts what the first leaves; HIP reads CUDA's name where its own is not set
        hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"
        variables = ["ROCR_VISIBLE_DEVICES", hip]
    for variable in variables:
        gpus = _visible(gpus, os.environ.get(variable))
    return [size for _, size in gpus]


def _visible(gpus: list[tuple[str, int]], chosen: Optional[str]) -> list[tuple[str, int]]:
    """Those of (uuid, bytes) that a variable chooses: numbers, or beginnings of uuids, up to the first that is none."""
    if chosen is None:
        return gpus
    left = []
    for word in map(str.strip, chosen.split(",")):
        found = [
            gpu
            for number, gpu in enumerate(gpus)
            if word == str(number) or (word.startswith("GPU-") and gpu[0].startswith(word))
        ]
        if not found:
            break
        left.append(found[0])
    return left


def available(root: Path = Path("/")) -> int:
    """Free memory in bytes: the host's, or less where a control group (a container, a Slurm job) limits this process.

    What caches hold counts as free. root: of the file system with proc and sys.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(min([free, *_left_by_groups(root)]), 0)


def _left_by_groups(root: Path) -> Iterator[int]:
    """Bytes that each control group of this process, and each around it, still gives."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = VERSION_1 if controllers else VERSION_2
        own = PurePosixPath(path)
        for group in (own, *own.parents):
            # in a container the path is the host's, and of all its folders the outermost alone may be here
            folder = root / version.place / group.relative_to("/")
            try:
                limit, used = ((folder / name).read_text().strip() for name in (version.limit, version.used))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                yield int(limit) - int(used) + sum(int(stat[name]) for name in version.caches)
