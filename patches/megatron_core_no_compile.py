"""megatron.core's small fused functions stay plain functions on a CPU.

It hands them to torch.compile while it is imported, which imports torch's whole compiler: a third of the time that a
rank needs to start. None of them runs in our layers, and on a CPU compiling one would need a C++ compiler.
"""

from __future__ import annotations

import importlib.abc
import sys

from primus_bridge.patching import Patch

JIT = "megatron.core.jit"


class _Loader(importlib.abc.Loader):
    """The module as it is, then its own switch."""

    def __init__(self, plain):
        self.plain = plain

    def create_module(self, spec):
        return self.plain.create_module(spec)

    def exec_module(self, module):
        self.plain.exec_module(module)
        module.disable_jit_fuser()


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != JIT:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not _Finder)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _apply() -> None:
    if JIT not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


PATCH = Patch(
    id="megatron-core-no-compile",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="importing it imports torch's compiler, for functions that are not used here",
    remove_when="megatron.core compiles its fused functions when they are first called",
    condition=lambda device: (device == "cpu", "no fused functions on a CPU" if device == "cpu" else "there is a GPU"),
    apply=_apply,
    order=15,
)
