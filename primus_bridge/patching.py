"""Patches of upstream packages: registered, selected by version and condition, applied once, reported.

A patch is a file in ``patches/`` with a module-level ``PATCH``. A patch whose condition holds while the installed
upstream version is outside its range is an error: an untested upstream is never patched on a guess.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, Optional

from primus_bridge.errors import ConfigError


@dataclass(frozen=True)
class Patch:
    """One defect or gap of an upstream package.

    package, versions: distribution name and the PEP 440 range the patch was tested on.
    condition: ``device -> (active, why)``; device is "cpu" or "cuda" (ROCm is "cuda", as in torch).
    apply: idempotent; called at most once a process by ``apply_patches``, maybe again by a host.
    remove_when: what must be true upstream before the file is deleted.
    order: smaller first; import hooks come before anything that imports the package.
    """

    id: str
    package: str
    versions: str
    reason: str
    remove_when: str
    condition: Callable[[str], tuple[bool, str]]
    apply: Callable[[], None]
    order: int = 50


_applied: dict[str, str] = {}


def default_device() -> str:
    """ "cuda" when torch sees a CUDA or ROCm device, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=1)
def _registered() -> tuple[Patch, ...]:
    package = importlib.import_module("primus_bridge.patches")
    names = [m.name for m in pkgutil.iter_modules(package.__path__)]
    found = [importlib.import_module(f"primus_bridge.patches.{name}").PATCH for name in names]
    return tuple(sorted(found, key=lambda patch: (patch.order, patch.id)))


def _installed(package: str) -> Optional[str]:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_range(version: str, versions: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    # a local build tag (2.13.0+cpu, +rocm6.4) and a pre-release do not change what the patch meets
    return SpecifierSet(versions).contains(Version(Version(version).base_version), prereleases=True)


def apply_patches(device: Optional[str] = None) -> list[str]:
    """Apply every patch that this machine needs, once; returns the ids of the active ones.

    Raises ConfigError when an upstream version is outside the range of a patch it needs.
    """
    device = device or default_device()
    active = []
    for patch in _registered():
        wanted, why = patch.condition(device)
        if not wanted:
            continue
        version = _installed(patch.package)
        if version is None or not _in_range(version, patch.versions):
            raise ConfigError(
                f"{patch.package} {version or '(not installed)'} is outside {patch.versions}, the versions that patch "
                f"'{patch.id}' was tested on ({patch.reason}); "
                f"install a tested one: pip install '{patch.package}{patch.versions}'"
            )
        if patch.id not in _applied:
            patch.apply()
            _applied[patch.id] = why
        active.append(patch.id)
    return active


def report(device: Optional[str] = None) -> list[dict]:
    """For ``primus doctor``: every patch with id, package, installed version, range, active, why, reason."""
    device = device or default_device()
    rows = []
    for patch in _registered():
        wanted, why = patch.condition(device)
        version = _installed(patch.package)
        rows.append(
            {
                "id": patch.id,
                "package": patch.package,
                "installed": version,
                "versions": patch.versions,
                "active": wanted,
                "why": why,
                "in_range": version is not None and _in_range(version, patch.versions),
                "reason": patch.reason,
                "remove_when": patch.remove_when,
            }
        )
    return rows
