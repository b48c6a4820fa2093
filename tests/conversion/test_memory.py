"""A rank's memory while it loads and exports: its own shard and half a GiB, however large the model is."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from primus_bridge.conversion.families import family_of
from primus_bridge.conversion.rules import expected_hf_tensors
from primus_bridge.conversion.safetensors_file import as_bytes, file_size
from tests.conversion.test_hf_weights import _write_sparse

CONFIG = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=6,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=64_000,
    max_position_embeddings=2048,
)


def test_a_model_several_times_larger_than_the_address_space(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = expected_hf_tensors(family_of(CONFIG, "").rules, family_of(CONFIG, "").architecture(CONFIG))
    shapes["model.norm.weight"] = shapes.pop("model.norm.weight")  # the last one of the file
    entries = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    path = folder / "model.safetensors"
    _write_sparse(path, entries)
    with path.open("r+b") as file:
        file.seek(-2, 2)
        file.write(as_bytes(torch.tensor([2.5], dtype=torch.bfloat16)))
    words = [sys.executable, "-m", "tests.conversion.limited_rank", str(folder), str(tmp_path / "out")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    _, shard, whole = result.stdout.split()[-3:]
    assert int(whole) > 3 * (int(shard) + 2**29)
    assert path.stat().st_blocks * 512 < 10**6  # sparse: the test takes no disk for it
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == file_size(entries)
