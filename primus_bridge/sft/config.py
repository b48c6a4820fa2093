"""SFTConfig: a run as Python keywords or a YAML file, under the names that users of transformers and PEFT know."""

from __future__ import annotations

import os
from typing import Any

from primus_bridge.config import BridgeArguments, describe
from primus_bridge.config.load import load
from primus_bridge.config.sft import read_fields
from primus_bridge.config.validate import validate
from primus_bridge.errors import ConfigError


class SFTConfig:
    """``SFTConfig(base_model=..., dataset_name=..., use_lora=True, learning_rate=2e-4, ...)``

    Names: those of config/sft.py, and every name of the flat dialect (``tensor_model_parallel_size=2``). ``arguments``
    is what they mean, each value with its source. Raises ConfigError, a ValueError, for a name that is not known (with
    the nearest one), a value of the wrong kind, and arguments that make no run.
    """

    __slots__ = ("arguments",)

    arguments: BridgeArguments

    def __init__(self, *positional: Any, **fields: Any):
        if positional:
            raise ConfigError(
                "it takes keywords, SFTConfig(base_model=..., dataset_name=...); a dict is SFTConfig(**fields), "
                f"and a file SFTConfig.from_yaml(path); got {positional[0]!r}",
                where="SFTConfig",
            )
        self.arguments = load(None, [], "sft", read_fields(fields, "SFTConfig"))
        validate(self.arguments)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike, **overrides: Any) -> SFTConfig:
        """A file of this spelling or of any other that ``primus train`` takes; overrides win over the file."""
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(
                f"it takes the path of a YAML file, and a dict is SFTConfig(**fields); got {path!r}",
                where="SFTConfig.from_yaml",
            )
        config = cls.__new__(cls)
        config.arguments = load(os.fspath(path), [], "sft", read_fields(overrides, "SFTConfig.from_yaml"))
        validate(config.arguments)
        return config

    def __repr__(self) -> str:
        given = [(name, value) for name, value, source in describe(self.arguments) if source != "default"]
        return f"SFTConfig({', '.join(f'{name}={value!r}' for name, value in given)})"
