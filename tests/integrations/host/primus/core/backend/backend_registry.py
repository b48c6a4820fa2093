"""Adapters by backend; a backend that is not there yet is imported, and registers itself."""

import importlib


class BackendRegistry:
    _adapters: dict = {}
    _hooks: dict = {}

    @classmethod
    def register_adapter(cls, backend: str, adapter_cls: type):
        cls._adapters[backend] = adapter_cls

    @classmethod
    def get_adapter(cls, backend: str, backend_path=None):
        if backend not in cls._adapters:
            importlib.import_module(f"primus.backends.{backend}")
        return cls._adapters[backend](backend)

    @classmethod
    def register_setup_hook(cls, backend: str, hook):
        cls._hooks.setdefault(backend, []).append(hook)

    @classmethod
    def run_setup(cls, backend: str):
        for hook in cls._hooks.get(backend, []):
            hook()
