"""What memory a rank has: that of a GPU, as given or found without torch, or its share of the host's."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

RESERVED = 0.08
"""Part of a GPU's memory that a plan leaves: the context, communication buffers, fragments between tensors."""
PROCESS_BYTES = 500 * 10**6
"""Of a rank on a CPU: Python, torch and its libraries."""
AMD_MEMORY = "/sys/class/drm/card*/device/mem_info_vram_total"


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
        total = _available() // ranks
        return cls("cpu", total, max(total - PROCESS_BYTES, 0), f"this host's free memory over {ranks} ranks")


def find_device(gpu_memory: Optional[int], device: Optional[str], ranks: int) -> Device:
    """gpu_memory: bytes that were given. device: dist.device of the arguments. ranks: of a host without GPUs."""
    if gpu_memory is not None:
        return Device.gpu(gpu_memory, "--gpu_memory")
    memories = [] if device == "cpu" else gpu_memories()
    return Device.gpu(min(memories), "found here") if memories else Device.cpu(ranks)


def gpu_memories() -> list[int]:
    """Bytes of each GPU of this host, NVIDIA's by its own tool, AMD's as the kernel says; empty without one."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
            return [int(line) * 2**20 for line in told.split()]
        except (OSError, subprocess.SubprocessError, ValueError):
            return []
    return [int(path.read_text()) for path in sorted(Path("/").glob(AMD_MEMORY[1:]))]


def _available() -> int:
    """Free memory of the host, in bytes; what caches hold counts as free."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells MemAvailable")
