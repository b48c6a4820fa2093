"""Python environments that have Megatron-Bridge, and processes in them with stand-ins for CUDA."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.command import JOB, ROOT
from tests.cli.example import save_model

PYTHONS = {"0.3": "PRIMUS_BRIDGE_PYTHON_WITH_BRIDGE", "0.6": "PRIMUS_BRIDGE_PYTHON_WITH_BRIDGE_0_6"}


def bridge_python(release: str) -> str:
    """The Python of a release; skips the test where there is none."""
    python = os.environ.get(PYTHONS[release])
    if python is None:
        pytest.skip(f"megatron-bridge {release} is not installed: {PYTHONS[release]} (tests/bridge/make_environment)")
    return python


def in_bridge(release: str, cwd: Path, *words: str, devices: int = 1) -> subprocess.CompletedProcess:
    """``python WORDS`` in a release's environment; the process has so many CUDA devices, which are the CPU."""
    environment = {name: value for name, value in os.environ.items() if name not in JOB}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "environment"), str(ROOT)]),
        "PRIMUS_TEST_CUDA_DEVICES": str(devices),
        "PRIMUS_BRIDGE_CACHE": str(cwd / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [bridge_python(release), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)


def portable_model(folder: Path, **changes) -> Path:
    """A model folder that both majors of transformers read: megatron-bridge 0.3 has version 4, the tests may have 5."""
    save_model(folder, **changes)
    for name, more in (
        ("config.json", {"rope_theta": 10000.0}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    return folder


def json_of(done: subprocess.CompletedProcess, file: Path):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(file.read_text())
