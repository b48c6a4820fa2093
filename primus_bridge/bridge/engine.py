"""The installed Megatron-Bridge: its version, whether it is one that we know, and its import with a clear error."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from primus_bridge.bridge.fields import Table, table_of
from primus_bridge.errors import ConfigError


def installed() -> Table:
    """The table of the installed version; nothing of it is imported. Raises ConfigError when there is none we know."""
    try:
        version = importlib.metadata.version("megatron-bridge")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "engine bridge needs megatron-bridge, which is not installed: pip install 'primus-bridge[bridge]' on a "
            "machine with CUDA, or leave --engine out to run on Megatron-Core directly"
        ) from None
    return table_of(version)


def imported(module: str) -> Any:
    """A module of it. Raises ConfigError when what it needs (Transformer Engine, a CUDA library) is not there."""
    installed()
    try:
        # its probes of optional packages are megatron.core's, which must have run before its own imports of them
        importlib.import_module("megatron.core")
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"megatron-bridge is installed and cannot be imported: {error}; it needs Transformer Engine and CUDA's "
            "libraries (its documentation has a container), or leave --engine out to run on Megatron-Core directly"
        ) from error


def read_safely() -> None:
    """Its checkpoints are read as ours: data, never code; of a Megatron-Core that our patch of the reader knows."""
    from packaging.version import Version

    if Version(importlib.metadata.version("megatron-core")).release[:2] == (0, 16):
        from primus_bridge.patches.torch_checkpoint_safe_load import PATCH

        PATCH.apply()


def usable() -> str:
    """For ``primus doctor``: 'usable', or why it is not."""
    from primus_bridge.launch.local import quiet_upstream

    quiet_upstream()
    try:
        imported("megatron.bridge.training.finetune")
    except ConfigError as error:
        return error.message
    import torch

    return "usable" if torch.cuda.is_available() else "usable for --dry_run: it trains on CUDA devices only"
