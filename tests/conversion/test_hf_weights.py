"""HFWeights: slices are exact and read only their bytes; what is wrong with the files is said with file and tensor."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from primus_bridge.conversion import hf_weights
from primus_bridge.conversion.hf_weights import HFWeights, read_header
from primus_bridge.conversion.safetensors_file import SafetensorsFile
from primus_bridge.errors import ConfigError

FILE = "model.safetensors"


def _write(path: Path, header: dict | bytes, data: bytes = b"") -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def _entry(dtype: str, shape: list, *offsets: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def _refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        HFWeights(folder)
    return str(error.value)


def _write_sparse(path: Path, entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """A file of zeros that takes no space, as SafetensorsFile lays it out."""
    from primus_bridge.conversion.safetensors_file import _layout

    header, _, size = _layout(entries)
    path.write_bytes(header)
    os.truncate(path, size)


# --- reading

SLICES = [slice(None), slice(2, 5), slice(0, 1), slice(3, 3), slice(5, 2), slice(4, 100), slice(None, -1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("block", [4 * 2**20, 16])
def test_slices_of_every_shape(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr(hf_weights, "BLOCK", block)  # 16 bytes: several blocks, and rows wider than a block
    shapes = [(), (0,), (7,), (1, 1), (7, 5), (6, 1), (0, 4), (4, 0), (5, 40), (5, 4, 3), (3, 7, 1)]
    tensors = {str(shape): (torch.randn(shape) * 100).to(dtype) for shape in shapes}
    save_file(tensors, tmp_path / FILE)
    weights = HFWeights(tmp_path)
    assert {name: info.shape for name, info in weights.tensors.items()} == {str(shape): shape for shape in shapes}

    def check(name: str, expected: torch.Tensor, **parts: slice) -> None:
        result = weights.read(name, **parts)
        assert result.dtype == dtype and result.is_contiguous()
        assert torch.equal(result, expected), (name, parts)

    for name, tensor in tensors.items():
        check(name, tensor)
        for rows in SLICES if tensor.dim() else ():
            check(name, tensor[rows], rows=rows)
            for columns in SLICES if tensor.dim() > 1 else ():
                check(name, tensor[:, columns], columns=columns)
                check(name, tensor[rows, columns], rows=rows, columns=columns)


def test_what_is_read_is_its_own(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / FILE)
    weights = HFWeights(tmp_path)
    weights.read("a").fill_(1)
    assert not weights.read("a").any()


def test_an_address_space_far_below_the_file(tmp_path):
    entries = {"w": (torch.bfloat16, (768, 2**22)), "narrow": (torch.bfloat16, (2**20, 64))}
    for name in (FILE, "out.safetensors"):
        _write_sparse(tmp_path / name, entries)
    with SafetensorsFile(tmp_path / FILE, entries) as file:
        file.write("w", torch.full((1, 1), 2.5), rows=slice(767, 768), columns=slice(2**22 - 1, 2**22))
    script = Path(__file__).with_name("limited.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    assert os.stat(tmp_path / FILE).st_blocks * 512 < 2**20
    (tmp_path / FILE).unlink()
    weights = HFWeights(tmp_path)
    assert torch.equal(weights.read("w", columns=slice(8, 16))[:, 3], torch.arange(768).bfloat16())
    last = weights.read("w", rows=slice(759, 768))
    assert last[1:, :8].all() and last[1:, 16:].all() and not last[0, 16:].any()


# --- which files


def test_an_index_is_followed(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "first.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "second.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def refused(**weight_map: str) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        message = _refused(tmp_path)
        assert message.startswith(str(index))
        return message

    index.write_text(json.dumps({"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}))
    assert set(HFWeights(tmp_path).tensors) == {"a", "b"}
    save_file({"a": torch.zeros(1)}, tmp_path / FILE)
    assert "beside it lies a model.safetensors" in refused(a="first.safetensors", b="second.safetensors")
    (tmp_path / FILE).unlink()
    assert "names a file outside the folder: '../o.safetensors' for tensor a" in refused(a="../o.safetensors")
    assert "names a file outside the folder: '/o.safetensors' for tensor a" in refused(a="/o.safetensors")
    assert "names files that are not there: third.safetensors" in refused(a="third.safetensors")
    assert "says that first.safetensors holds tensor c, which it does not" in refused(c="first.safetensors")
    swapped = refused(a="second.safetensors", b="first.safetensors")
    assert "says that second.safetensors holds tensor a, which it does not; first.safetensors does" in swapped
    assert "names no tensors" in refused()
    index.write_text(json.dumps({"weight_map": ["a"]}))
    assert "weight_map is not an object" in _refused(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    message = f"{tmp_path}/model-00002-of-00002.safetensors: tensor a is also in model-00001-of-00002.safetensors"
    assert _refused(tmp_path) == message


def test_the_same_model_under_other_names_is_left(tmp_path):
    save_file({"tok_embeddings.weight": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert set(HFWeights(tmp_path).tensors) == {"tok_embeddings.weight"}
    save_file({"model.embed_tokens.weight": torch.ones(1)}, tmp_path / FILE)
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(HFWeights(tmp_path).tensors) == {"model.embed_tokens.weight"}


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert _refused(tmp_path).endswith("has no weights (*.safetensors or pytorch_model*.bin)")


# --- damaged files


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / FILE
    save_file({"a": torch.ones(100), "b": torch.ones(100)}, path)
    whole = path.read_bytes()
    end = len(whole) - 8 - struct.unpack("<Q", whole[:8])[0]
    assert end == 800
    path.write_bytes(whole[:-100])
    assert _refused(tmp_path).startswith(f"{path}: truncated: tensor b ends at byte {len(whole)}, the file at")
    for size in (0, 5, 100):
        path.write_bytes(whole[:size])
        assert _refused(tmp_path) == f"{path}: truncated or not a safetensors file ({size} bytes)"
    _write(path, b"x" * 10, b"y" * 30)
    assert _refused(tmp_path) == f"{path}: not a safetensors file: its header is not JSON"
    _write(path, b"[1]")
    assert "its header is no JSON object" in _refused(tmp_path)
    path.unlink()
    path.symlink_to("nowhere")
    assert _refused(tmp_path) == f"{path}: cannot be read: No such file or directory"


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / FILE)
    weights = HFWeights(tmp_path)
    os.truncate(tmp_path / FILE, 200)
    with pytest.raises(ConfigError, match="truncated: tensor a ends after the file"):
        weights.read("a")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": _entry("F32", [2], 0, 7)}, "tensor a, F32 [2], takes 8 bytes, its data_offsets [0, 7] hold 7"),
        ({"a": _entry("F32", [2], 8, 0)}, "tensor a, F32 [2], takes 8 bytes, its data_offsets [8, 0] hold -8"),
        ({"a": _entry("F32", [2], 0, 8), "b": _entry("I8", [4], 6, 10)}, "tensors a and b overlap"),
        ({"a": _entry("F32", [2], 4, 12), "b": _entry("F32", [2], 0, 8)}, "tensors b and a overlap"),
        ({"a": _entry("F32", [1000], 0, 4000)}, "truncated: tensor a ends at byte"),
        ({"a": _entry("F32", [-2], 0, 8)}, "damaged header: tensor a is described as"),
        ({"a": _entry("F32", [2.0], 0, 8)}, "damaged header: tensor a is described as"),
        ({"a": _entry("F32", [2], 0)}, "damaged header: tensor a is described as"),
        ({"a": _entry("F32", None, 0, 8)}, "damaged header: tensor a is described as"),
        ({"a": {"dtype": "F32"}}, "damaged header: tensor a is described as"),
        ({"a": _entry(7, [2], 0, 8)}, "damaged header: tensor a is described as"),
        ({"a": 3}, "damaged header: tensor a is described as 3"),
        ({"a": _entry("C64", [1], 0, 8)}, "tensor a has dtype C64, which is not supported"),
        ({"a": _entry("F8_E4M3", [8], 0, 8)}, "quantised (tensor a has dtype F8_E4M3); give the unquantised model"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    _write(tmp_path / FILE, header, b"\0" * 16)
    assert message in _refused(tmp_path)
    assert str(tmp_path / FILE) in _refused(tmp_path)


def test_empty_tensors_share_a_place(tmp_path):
    _write(tmp_path / FILE, {"a": _entry("F32", [0], 4, 4), "b": _entry("F32", [2], 0, 8)}, b"\0" * 8)
    assert set(read_header(tmp_path / FILE)) == {"a", "b"}


# --- quantised checkpoints


@pytest.mark.parametrize(
    "name", ["l.qweight", "l.weight_scale", "l.weight_scale_inv", "l.weight.absmax", "l.SCB", "l.weight_packed"]
)
def test_quantised_weights(tmp_path, name):
    save_file({"l.weight": torch.zeros(4, dtype=torch.int8), name: torch.ones(1)}, tmp_path / FILE)
    message = f"the checkpoint is quantised (tensor {name}); give the unquantised model"
    assert _refused(tmp_path) == f"{tmp_path / FILE}: {message}"


def test_a_quantised_config(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / FILE)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    assert "config.json: the checkpoint is quantised (quantization_config)" in _refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": None}))
    HFWeights(tmp_path)


# --- pickled weights


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights(tmp_path, zipped):
    base = torch.randn(6, 4)
    tensors = {"a": base, "tied": base, "turned": base.t(), "part": base[2:4, 1:], "scalar": torch.tensor(2.0)}
    tensors["half"] = torch.randn(3, 2, 2).bfloat16()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    weights = HFWeights(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(weights.read(name), tensor) and weights.read(name).is_contiguous()
        assert weights.tensors[name].shape == tensor.shape
    assert torch.equal(weights.read("turned", rows=slice(1, 3)), base.t()[1:3])
    assert torch.equal(weights.read("a", rows=slice(1, 3), columns=slice(2, 9)), base[1:3, 2:])
    weights.read("a").zero_()
    assert torch.equal(weights.read("tied"), base)


def test_pickled_shards(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert set(HFWeights(tmp_path).tensors) == {"a", "b"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "pytorch_model-00002-of-00002.bin"}}))
    assert set(HFWeights(tmp_path).tensors) == {"b"}
    index.write_text(json.dumps({"weight_map": {"b": "../b.bin"}}))
    assert "names a file outside the folder: '../b.bin' for tensor b" in _refused(tmp_path)


def test_damaged_pickles(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for damaged in (b"", b"x", whole[:3000], whole[:100]):
        path.write_bytes(damaged)
        assert _refused(tmp_path).startswith(f"{path}: truncated or not a PyTorch weights file")
    torch.save([torch.ones(1)], path)
    assert _refused(tmp_path) == f"{path}: holds no mapping of names and tensors"
    torch.save({"model": {"a": torch.ones(1)}}, path)
    assert _refused(tmp_path) == f"{path}: model is no tensor but dict"
    torch.save({"a": torch.ones(1, dtype=torch.complex64)}, path)
    assert _refused(tmp_path) == f"{path}: tensor a has dtype torch.complex64, which is not supported"
