"""Primus's own backend: importing it registers it."""

from primus.core.backend.backend_adapter import BackendAdapter
from primus.core.backend.backend_registry import BackendRegistry


class MegatronBridgeAdapter(BackendAdapter):
    def load_trainer_class(self, stage="sft"):
        raise AssertionError("Primus's own trainer was asked for")

    convert_config = detect_backend_version = load_trainer_class


BackendRegistry.register_adapter("megatron_bridge", MegatronBridgeAdapter)
