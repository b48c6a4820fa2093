"""Configuration: one call from a file and a command line to typed arguments with their sources."""

from __future__ import annotations

import os
from typing import Any, Optional

from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.run_yaml import read_run_yaml, write_run_yaml

__all__ = ["BridgeArguments", "describe", "load_arguments", "read_run_yaml", "write_run_yaml"]


def load_arguments(config_path: Optional[str], overrides: list[str], stage: Optional[str] = None) -> BridgeArguments:
    """The resolved arguments: defaults < recipe or preset < config file < overrides, later wins.

    config_path: a file of either dialect, or None. overrides: words of a command line. stage: what was typed after
    ``primus train`` ('sft' or 'posttrain', 'pretrain'), or None. Raises ConfigError, with file:line, for anything that
    is not understood; the values themselves are checked by config.validate.
    """
    from primus_bridge.config.load import load

    return load(os.fspath(config_path) if config_path is not None else None, list(overrides), stage)


def describe(arguments: BridgeArguments) -> list[tuple[str, Any, str]]:
    """(dotted name, value, source) of every argument, in the order of the sections."""
    return [(name, schema.get(arguments, name), arguments.sources.get(name, "default")) for name in schema.fields()]
