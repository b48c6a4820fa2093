"""BackendRegistry: trainers by (backend, stage), adapters by backend."""

from __future__ import annotations

import importlib
from typing import Any, Union

from primus_bridge.errors import ConfigError, did_you_mean

BRIDGE_ENGINE = "megatron_bridge/bridge"
"""The backend of ``engine: bridge``."""

ClassOrPath = Union[type, str]
"""A class, or 'package.module:Class', imported when it is first asked for."""


class BackendRegistry:
    """Which trainer runs a stage of a backend. Registering imports nothing when the class is given by path."""

    _trainers: dict[tuple[str, str], ClassOrPath] = {}
    _adapters: dict[str, Any] = {}

    @classmethod
    def register_trainer_class(cls, trainer_class: ClassOrPath, backend: str, stage: str = "pretrain") -> None:
        """Register (again: replace) the trainer of a stage."""
        if not isinstance(trainer_class, type) and ":" not in trainer_class:
            raise TypeError(f"the trainer comes first, a class or 'package.module:Class', not {trainer_class!r}")
        cls._trainers[(backend, stage)] = trainer_class

    @classmethod
    def get_trainer_class(cls, backend: str, stage: str = "pretrain") -> type:
        """The trainer class. Raises ConfigError, with the known names, for an unknown backend or stage."""
        if (backend, stage) not in cls._trainers:
            backends = sorted({known for known, _ in cls._trainers})
            if backend not in backends:
                raise ConfigError(
                    f"no trainer for backend '{backend}'; known backends: {', '.join(backends)}"
                    f"{did_you_mean(backend, backends)}"
                )
            stages = sorted(known for name, known in cls._trainers if name == backend)
            raise ConfigError(
                f"backend '{backend}' has no stage '{stage}'; its stages: {', '.join(stages)}"
                f"{did_you_mean(stage, stages)}"
            )
        return _imported(cls._trainers[(backend, stage)])

    @classmethod
    def register_adapter(cls, backend: str, adapter: Any) -> None:
        """Register (again: replace) an adapter class, instance, or 'package.module:Class'."""
        cls._adapters[backend] = adapter

    @classmethod
    def get_adapter(cls, backend: str) -> Any:
        """An adapter instance. Raises ConfigError, with the known names, for an unknown backend."""
        if backend not in cls._adapters:
            known = sorted(cls._adapters)
            raise ConfigError(
                f"no adapter for backend '{backend}'; known: {', '.join(known)}{did_you_mean(backend, known)}"
            )
        adapter = _imported(cls._adapters[backend])
        return adapter() if isinstance(adapter, type) else adapter


def _imported(entry: Any) -> Any:
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


BackendRegistry.register_trainer_class("primus_bridge.trainers.pretrain:PretrainTrainer", "megatron_bridge")
BackendRegistry.register_trainer_class("primus_bridge.trainers.posttrain:SFTTrainer", "megatron_bridge", "sft")
BackendRegistry.register_adapter("megatron_bridge", "primus_bridge.adapter:MegatronBridgeAdapter")
BackendRegistry.register_trainer_class("primus_bridge.bridge.trainer:BridgeSFTTrainer", BRIDGE_ENGINE, "sft")
BackendRegistry.register_adapter(BRIDGE_ENGINE, "primus_bridge.bridge.adapter:BridgeEngineAdapter")
