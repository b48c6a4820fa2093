"""What a backend is asked for."""

from abc import ABC, abstractmethod
from typing import Any, Optional


class BackendAdapter(ABC):
    def __init__(self, framework: str):
        self.framework = framework
        self.third_party_dir_name: Optional[str] = None

    def prepare_backend(self, config: Any):
        from primus.core.backend.backend_registry import BackendRegistry

        BackendRegistry.run_setup(self.framework)

    def setup_backend_path(self, backend_path=None) -> str:
        raise AssertionError("no third_party folder here")

    @abstractmethod
    def load_trainer_class(self, stage: str = "pretrain", trainer_class: Optional[str] = None): ...

    @abstractmethod
    def convert_config(self, params: Any) -> Any: ...

    @abstractmethod
    def detect_backend_version(self) -> str: ...
