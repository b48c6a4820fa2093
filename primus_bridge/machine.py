"""What this machine has, and what the package makes of it: versions, devices, optional parts, patches."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

from primus_bridge import __version__

PACKAGES = (
    "torch megatron-core transformers tokenizers sentencepiece safetensors datasets pyyaml jinja2 rich tensorboard "
    "matplotlib numpy filelock huggingface_hub"
).split()

# distribution, module to look for, what it is for
OPTIONAL = (
    ("transformer-engine", "transformer_engine", "fused layers on a GPU (extra: gpu)"),
    ("apex", "apex", "fused optimizer on a GPU"),
    ("flash-attn", "flash_attn", "attention kernels on a GPU"),
    ("nemo-run", "nemo_run", "submitting jobs (extra: launch)"),
    ("wandb", "wandb", "Weights & Biases (extra: wandb)"),
    ("megatron-bridge", "megatron.bridge", "a second engine, engine: bridge (extra: bridge)"),
)


def examine() -> dict[str, Any]:
    """What `primus doctor` prints and a run notes down: python, system, packages, devices, optional, patches."""
    from primus_bridge.patching import report

    return {
        "primus_bridge": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "optional": [
            {"name": name, "version": _version(name) if _found(module) else None, "found": _found(module), "use": use}
            for name, module, use in OPTIONAL
        ],
        "patches": report(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _devices() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices: dict[str, Any] = {"cpu_cores": cores, "runtime": "none", "gpus": []}
    if torch.version.hip:
        devices["runtime"] = f"ROCm {torch.version.hip}"
    elif torch.version.cuda:
        devices["runtime"] = f"CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices["gpus"].append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return devices
