"""BridgeEngineAdapter: the adapter of engine bridge, whose upstream is Megatron-Bridge as it is installed."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from primus_bridge.adapter import MegatronBridgeAdapter
from primus_bridge.registry import BRIDGE_ENGINE


class BridgeEngineAdapter(MegatronBridgeAdapter):
    """The same protocol; of the patches, which are for our use of Megatron-Core, only the safe reader is applied."""

    def __init__(self, framework: str = BRIDGE_ENGINE):
        super().__init__(framework)

    def prepare_backend(self, config: Any = None) -> None:
        """Raises ConfigError when Megatron-Bridge is missing or of a version that is not known."""
        from primus_bridge.bridge.engine import installed, read_safely

        installed()
        read_safely()

    def detect_backend_version(self) -> str:
        """The version of the installed Megatron-Bridge; it is not imported."""
        from primus_bridge.bridge.engine import installed

        installed()
        return importlib.metadata.version("megatron-bridge")
