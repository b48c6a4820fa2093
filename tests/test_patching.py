"""Patches: chosen by condition, refused outside their version range, applied once, reported."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from primus_bridge.patches.megatron_core_cpu_device import on_cpu

from primus_bridge import patching
from primus_bridge.errors import ConfigError
from primus_bridge.patching import Patch, apply_patches, report


def _patch(**changes):
    calls = []
    fields = {
        "id": "test-patch",
        "package": "torch",
        "versions": ">=2.7",
        "reason": "for a test",
        "remove_when": "the test ends",
        "condition": lambda device: (device == "cpu", "because"),
        "apply": lambda: calls.append(1),
    }
    return Patch(**(fields | changes)), calls


@pytest.fixture
def registered(monkeypatch):
    """A function that makes the given patches the only ones."""

    def only(*patches):
        monkeypatch.setattr(patching, "_registered", lambda: patches)
        monkeypatch.setattr(patching, "_applied", {})

    return only


def test_applied_once_and_only_where_its_condition_holds(registered):
    patch, calls = _patch()
    registered(patch)
    assert apply_patches("cuda") == [] and not calls
    assert apply_patches("cpu") == ["test-patch"]
    assert apply_patches("cpu") == ["test-patch"]
    assert len(calls) == 1


def test_an_untested_upstream_version_is_a_clear_error(registered):
    patch, calls = _patch(versions=">=99")
    registered(patch)
    with pytest.raises(ConfigError) as error:
        apply_patches("cpu")
    for part in ("torch", "outside >=99", "'test-patch'", "for a test", "pip install 'torch>=99'"):
        assert part in str(error.value)
    assert not calls
    assert apply_patches("cuda") == []  # where it is not needed, no version matters
    assert report("cpu")[0]["in_range"] is False


def test_a_missing_package_is_a_clear_error(registered):
    patch, _ = _patch(package="no-such-distribution")
    registered(patch)
    with pytest.raises(ConfigError, match=r"no-such-distribution \(not installed\)"):
        apply_patches("cpu")


def test_every_shipped_patch_says_what_it_is():
    rows = report("cpu")
    ids = {row["id"] for row in rows}
    assert {"megatron-core-cpu-device", "torch-cuda-calls-on-cpu", "megatron-core-fused-adamw"} <= ids
    for row in rows:
        assert row["versions"] and row["reason"] and row["remove_when"] and row["why"]
        module = importlib.import_module("primus_bridge.patches." + row["id"].replace("-", "_"))
        assert module.PATCH.id == row["id"]


def test_nothing_asks_for_cuda_at_import_and_the_order_is_guarded():
    """In a fresh process: our rooms import without a device; megatron.core imported too early is said so."""
    code = (
        "import primus_bridge.megatron.model, primus_bridge.trainers.base, torch;"
        "import megatron.core.parallel_state as ps;"
        "assert not torch.cuda.is_initialized();"
        "assert ps.__spec__.loader.__class__.__module__ == 'primus_bridge.patches.megatron_core_cpu_device'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    late = "import megatron.core; from primus_bridge.patching import apply_patches; apply_patches('cpu')"
    failed = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, timeout=120)
    assert failed.returncode != 0 and "was imported before its CPU patch" in failed.stderr


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ('torch.zeros(1, device="cuda")', 'torch.zeros(1, device="cpu")'),
        ("torch.device('cuda')", "torch.device('cpu')"),
        ("'torch.cuda.FloatTensor'", "'torch.FloatTensor'"),
        ("x.cuda() + y.cuda(non_blocking=True)", "x.cpu() + y.cpu()"),
        ("x.cuda(torch.cuda.current_device())", "x.cpu()"),
        ("torch.cuda.current_device()", "torch.cuda.current_device()"),
        ("cuda = options['cuda_graph']", "cuda = options['cuda_graph']"),
    ],
)
def test_what_the_source_of_megatron_core_becomes_on_a_cpu(theirs, ours):
    assert on_cpu(theirs.encode()) == ours.encode()
