"""megatron.core compiled for the CPU: its hard-coded "cuda" literals and .cuda() calls become "cpu".

The literals are rewritten while the modules are compiled, so that nothing is paid at run time and tracebacks keep
their lines. A TorchFunctionMode would do the same at a cost on every operation.
"""

from __future__ import annotations

import ast
import importlib.machinery
import sys

from primus_bridge.patching import Patch


class _ToCPU(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if value == "cuda":
            return ast.copy_location(ast.Constant("cpu"), node)
        if isinstance(value, str) and value.startswith("torch.cuda.") and value.endswith("Tensor"):
            return ast.copy_location(ast.Constant(value.replace("torch.cuda.", "torch.")), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        method = node.func
        on_torch = (
            isinstance(method, ast.Attribute) and isinstance(method.value, ast.Name) and method.value.id == "torch"
        )
        if isinstance(method, ast.Attribute) and method.attr == "cuda" and not on_torch:
            method.attr, node.args, node.keywords = "cpu", [], []
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, plain: importlib.machinery.SourceFileLoader):
        super().__init__(plain.name, plain.path)
        self.plain = plain

    def source_to_code(self, data, path, *, _optimize=-1):
        tree = _ToCPU().visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname):
        # not the parent's: that one would read and write the .pyc of the unpatched source
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if b"cuda" not in source:
            return self.plain.get_code(fullname)  # nothing to rewrite: what lies compiled will do
        return self.source_to_code(source, path)


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
