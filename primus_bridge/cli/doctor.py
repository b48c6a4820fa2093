"""``primus doctor``: versions, devices, optional parts found or missing, active patches and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

from primus_bridge import __version__

HELP = """\
primus doctor: what this machine has, and what the package makes of it

usage: primus doctor [--json]

  --json   the same as one JSON object

examples:
  primus doctor
  primus doctor --json | python -m json.tool
"""

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
    ("megatron-bridge", "megatron.bridge", "comparison runs (extra: bridge)"),
)


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    from primus_bridge.errors import ConfigError, did_you_mean

    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    for word in argv:
        if word != "--json":
            raise ConfigError(f"unknown option '{word}'{did_you_mean(word, ['--json'])}; see primus doctor --help")
    facts = examine()
    print(json.dumps(facts, indent=2)) if "--json" in argv else _print(facts)
    return 0


def examine() -> dict[str, Any]:
    """Everything doctor prints: python, packages, devices, optional, patches."""
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


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in columns:
            made.add_column(column, overflow="fold")
        return made

    console.print(f"primus-bridge {facts['primus_bridge']}, Python {facts['python']}", highlight=False)
    console.print(facts["system"], highlight=False)
    packages = table("\nPackages", "package", "version")
    for name, version in facts["packages"].items():
        packages.add_row(name, version or "[red]missing[/red]")
    console.print(packages)
    devices = facts["devices"]
    console.print(
        f"\nDevices\n{devices['cpu_cores']} CPU cores; GPU runtime of torch: {devices['runtime']}", highlight=False
    )
    for index, gpu in enumerate(devices["gpus"]):
        console.print(f"GPU {index}: {gpu}", highlight=False)
    if not devices["gpus"]:
        console.print("no GPU: runs use gloo on the CPU", highlight=False)
    optional = table("\nOptional parts", "part", "state", "for")
    for part in facts["optional"]:
        optional.add_row(part["name"], part["version"] or ("found" if part["found"] else "missing"), part["use"])
    console.print(optional)
    patches = table("\nPatches of upstream packages", "patch", "state", "package", "because")
    for patch in facts["patches"]:
        state = "active" if patch["active"] else "off"
        if patch["active"] and not patch["in_range"]:
            state = f"[red]needs {patch['versions']}[/red]"
        package = f"{patch['package']} {patch['installed'] or 'missing'} ({patch['versions']})"
        patches.add_row(patch["id"], state, package, f"{patch['why']}: {patch['reason']}")
    console.print(patches)


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
