"""megatron.core compiled for the CPU: its hard-coded "cuda" literals and .cuda() calls become "cpu".

They are rewritten in the source before it is compiled, so that nothing is paid at run time and tracebacks keep their
lines. A TorchFunctionMode would do the same at a cost on every operation.
"""

from __future__ import annotations

import importlib.machinery
import re
import sys

from primus_bridge.patching import Patch

# text, not a syntax tree: a rank would spend a second of its start on walking the trees
_REWRITES = (
    (re.compile(rb"""(["'])cuda\1"""), rb"\1cpu\1"),
    (re.compile(rb"""(["'])torch\.cuda\.(\w+Tensor)\1"""), rb"\1torch.\2\1"),
    # x.cuda(...) but not torch.cuda(...); its arguments, one call among them at most, are for a GPU alone
    (re.compile(rb"(?<!torch)\.cuda\([^()\n]*(\(\)[^()\n]*)?\)"), b".cpu()"),
)


def on_cpu(source: bytes) -> bytes:
    """The source of a module with every tensor made on, or moved to, the CPU; its lines stay where they are."""
    for pattern, replacement in _REWRITES:
        source = pattern.sub(replacement, source)
    return source


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, plain: importlib.machinery.SourceFileLoader):
        super().__init__(plain.name, plain.path)
        self.plain = plain

    def get_code(self, fullname):
        # not the parent's: that one would read and write the .pyc of the unpatched source
        path = self.get_filename(fullname)
        source = self.get_data(path)
        rewritten = on_cpu(source)
        if rewritten == source:
            return self.plain.get_code(fullname)  # nothing to rewrite: what lies compiled will do
        return compile(rewritten, path, "exec", dont_inherit=True)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "megatron.core" and not name.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader)
        return spec


def _apply() -> None:
    if _Finder in sys.meta_path:
        return
    early = [name for name in sys.modules if name.startswith("megatron.core")]
    if early:
        raise RuntimeError(f"megatron.core was imported before its CPU patch: {early[0]}; call apply_patches() first")
    sys.meta_path.insert(0, _Finder)


PATCH = Patch(
    id="megatron-core-cpu-device",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason='megatron.core names the device "cuda" in about 60 places, so it cannot run without one',
    remove_when="megatron.core takes its device from a setting",
    condition=lambda device: (device == "cpu", "no CUDA or ROCm device" if device == "cpu" else "there is a GPU"),
    apply=_apply,
    order=10,
)
