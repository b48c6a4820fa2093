"""A backend of another framework."""

from types import SimpleNamespace

from primus.core.backend.backend_adapter import BackendAdapter
from primus.core.backend.backend_registry import BackendRegistry


class OtherAdapter(BackendAdapter):
    def setup_backend_path(self, backend_path=None):
        return ""

    def load_trainer_class(self, stage="pretrain"):
        raise SystemExit("Primus's other framework runs")

    def convert_config(self, params):
        return SimpleNamespace(rng=SimpleNamespace(seed=0))

    def detect_backend_version(self):
        return "1"


BackendRegistry.register_adapter("other", OtherAdapter)
