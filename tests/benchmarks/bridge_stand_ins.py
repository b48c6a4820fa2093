"""What compare_bridge.py puts in place of what a bridge's environment without CUDA lacks.

Modules of Transformer Engine that hold its parameters under its names and compute nothing, any other name of it and of
triton, and "cuda" as another word for "cpu". Parameters start as NaN, so one that a bridge forgets is seen.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def parameter(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, float("nan"), dtype=dtype))


class Linear(torch.nn.Module):
    def __init__(self, in_features, out_features, bias, params_dtype, num_gemms=None, **_):
        super().__init__()
        for gemm in [""] if num_gemms is None else range(num_gemms):
            self.register_parameter(f"weight{gemm}", parameter(out_features, in_features, dtype=params_dtype))
            if bias:
                self.register_parameter(f"bias{gemm}", parameter(out_features, dtype=params_dtype))


class GroupedLinear(Linear):
    pass


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, bias, params_dtype, normalization="LayerNorm", **_):
        super().__init__(in_features, out_features, bias, params_dtype)
        self.layer_norm_weight = parameter(in_features, dtype=params_dtype)
        if normalization == "LayerNorm":
            self.layer_norm_bias = parameter(in_features, dtype=params_dtype)


class RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, params_dtype=torch.float32, **_):
        super().__init__()
        self.weight = parameter(hidden_size, dtype=params_dtype)


class DotProductAttention(torch.nn.Module):
    def __init__(self, *_, **__):
        super().__init__()


class _AnyName(type):
    """A class that can be a base class, a decorator and a namespace, whatever an import expects of it."""

    def __getattr__(cls, name: str) -> _AnyName:
        return any_name(name)


def any_name(name: str) -> _AnyName:
    if name.startswith("__"):
        raise AttributeError(name)
    calls = {"__init__": lambda self, *_, **__: None, "__call__": lambda self, *_, **__: self}
    return _AnyName(name, (), calls)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        # without cpu_offload megatron.core offloads nothing; with an empty one it would try
        if name.split(".")[0] in ("transformer_engine", "triton") and not name.endswith(".cpu_offload"):
            return importlib.machinery.ModuleSpec(name, _Finder, is_package=True)
        return None

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__version__, module.__getattr__ = "2.10.0", any_name  # the least that megatron-bridge 0.3.1 asks for
        if spec.name == "transformer_engine.pytorch":
            for layer in (Linear, GroupedLinear, LayerNormLinear, RMSNorm, DotProductAttention):
                setattr(module, layer.__name__, layer)
        return module

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        pass


class _OnCPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]

        def device(value):
            return "cpu" if isinstance(value, str) and value.startswith("cuda") else value

        return func(*map(device, args), **{key: device(value) for key, value in (kwargs or {}).items()})


def install() -> None:
    """For the rest of this process; before megatron is imported."""
    sys.meta_path.insert(0, _Finder)
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = lambda *_, **__: None
    _OnCPU().__enter__()
