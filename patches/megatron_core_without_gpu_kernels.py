"""On a CPU megatron.core runs without Transformer Engine and apex, also where they are installed.

Both bind at import to kernels and buffers on a GPU: their Adam, their gradient norm. megatron.core has its own way
without them, which it takes when importing them fails.
"""

from __future__ import annotations

import importlib.util
import sys

from primus_bridge.patching import Patch

PACKAGES = ("transformer_engine", "apex")


def installed() -> list[str]:
    """Those of PACKAGES that this environment has."""
    # already hidden ones count: they are installed
    return [name for name in PACKAGES if name in sys.modules or importlib.util.find_spec(name) is not None]


def _needed(device: str) -> tuple[bool, str]:
    if device != "cpu":
        return False, "there is a GPU"
    found = installed()
    return bool(found), f"{' and '.join(found)} installed, no GPU used" if found else "neither is installed"


def _apply() -> None:
    for name in installed():
        # None makes the import fail as if the package were not there
        sys.modules[name] = None  # type: ignore[assignment]


PATCH = Patch(
    id="megatron-core-without-gpu-kernels",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="with Transformer Engine or apex installed megatron.core takes their GPU kernels on a CPU too",
    remove_when="megatron.core chooses its optimizer and norms by device",
    condition=_needed,
    apply=_apply,
    order=5,
)
