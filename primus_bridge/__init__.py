"""primus_bridge: Megatron-Core post-training from one YAML, from a Hugging Face model and back to one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from primus_bridge.callbacks.base import Callback as Callback
    from primus_bridge.callbacks.checkpointing import CheckpointCallback as CheckpointCallback
    from primus_bridge.callbacks.validation import ValidationCallback as ValidationCallback
    from primus_bridge.callbacks.wandb import WandBCallback as WandBCallback
    from primus_bridge.checkpoint.components import SharingPattern as SharingPattern
    from primus_bridge.checkpoint.components import StateComponent as StateComponent
    from primus_bridge.errors import ConfigError as ConfigError
    from primus_bridge.sft.config import SFTConfig as SFTConfig
    from primus_bridge.sft.trainer import SFTTrainer as SFTTrainer

__version__ = "0.1.0"

_HOMES = {
    "Callback": "callbacks.base",
    "CheckpointCallback": "callbacks.checkpointing",
    "ConfigError": "errors",
    "SFTConfig": "sft.config",
    "SFTTrainer": "sft.trainer",
    "SharingPattern": "checkpoint.components",
    "StateComponent": "checkpoint.components",
    "ValidationCallback": "callbacks.validation",
    "WandBCallback": "callbacks.wandb",
}
"""The Python API, imported when it is first asked for: the command line starts without it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
