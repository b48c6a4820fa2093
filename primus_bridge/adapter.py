"""MegatronBridgeAdapter: what Primus (and our command line) calls to run a module on this backend."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any, Union

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.dotted import imported
from primus_bridge.errors import ConfigError
from primus_bridge.registry import BackendRegistry


class MegatronBridgeAdapter:
    """Environment, typed arguments and the trainer class of a stage; Primus's BackendAdapter protocol."""

    def __init__(self, framework: str = "megatron_bridge"):
        self.framework = framework

    def load_trainer_class(self, stage: str = "pretrain", trainer_class: Union[type, str, None] = None) -> type:
        """The trainer registered for the stage, or ``trainer_class``: the caller's own, or its dotted path."""
        if isinstance(trainer_class, str):
            return imported(trainer_class, "trainer", example="my_package.trainers.MyTrainer", where="trainer_class")
        return trainer_class or BackendRegistry.get_trainer_class(self.framework, stage=stage)

    def convert_config(self, params: Any) -> BridgeArguments:
        """A Primus module's merged settings (a namespace or a dict), or BridgeArguments -> BridgeArguments.

        Unset weights and save follow the experiment dialect's rules, except the save folder, which needs the
        experiment's names. Raises ConfigError for a key or a value that is not understood.
        """
        if isinstance(params, BridgeArguments):
            return params
        from primus_bridge.config.load import from_params

        return from_params(as_dict(params))

    def setup_backend_path(self, backend_path: Any = None) -> list[str]:
        """Put the folders of a backend's source before the others on sys.path; returns those that were added.

        Megatron-Core comes from the environment, so no path is needed. Raises ConfigError for a folder that is missing.
        """
        paths = [backend_path] if isinstance(backend_path, (str, Path)) else list(backend_path or [])
        for path in paths:
            if not Path(path).is_dir():
                raise ConfigError("the backend path is no folder", where=str(path))
        added = [str(path) for path in paths if str(path) not in sys.path]
        sys.path[:0] = added
        return added

    def prepare_backend(self, config: Any = None) -> None:
        """Apply the patches of the upstream packages, before any of them is imported; again is harmless."""
        from primus_bridge.patching import apply_patches

        apply_patches(device=config.dist.device if isinstance(config, BridgeArguments) else None)

    def detect_backend_version(self) -> str:
        """The version of the installed Megatron-Core; it is not imported."""
        try:
            return importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError("megatron-core is not installed: pip install 'megatron-core>=0.16,<0.17'") from None


def as_dict(params: Any) -> Any:
    """Namespaces, at any depth -> dicts."""
    if isinstance(params, dict):
        return {key: as_dict(value) for key, value in params.items()}
    if isinstance(params, (list, tuple)):
        return [as_dict(value) for value in params]
    return as_dict(vars(params)) if hasattr(params, "__dict__") else params
