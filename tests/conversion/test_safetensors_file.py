"""SafetensorsFile: regions land where they belong and nowhere else, from any memory, from several processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from primus_bridge.conversion import safetensors_file
from primus_bridge.conversion.safetensors_file import SafetensorsFile, file_size, write_safetensors


def _entries(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_stream_of_tensors(tmp_path):
    tensors = {
        "odd": torch.randn(3).bfloat16(),  # what follows would not be aligned in this order
        "a": torch.randn(7, 5),
        "scalar": torch.tensor(3.0).half(),
        "empty": torch.zeros(0, 4),
        "cube": torch.randn(2, 3, 4).double(),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(2, 0, 3, dtype=torch.int32),
    }
    path = tmp_path / "model.safetensors"
    write_safetensors(path, _entries(tensors), tensors.items())
    _same(path, tensors)
    assert path.stat().st_size == file_size(_entries(tensors))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "writer": "primus_bridge"}
    write_safetensors(tmp_path / "none.safetensors", {}, [])
    _same(tmp_path / "none.safetensors", {})
    with pytest.raises(ValueError):
        write_safetensors(path, _entries(tensors), list(tensors.items())[:3])


@pytest.mark.parametrize("block", [8 * 2**20, 40])
def test_regions_of_every_memory(tmp_path, monkeypatch, block):
    monkeypatch.setattr(safetensors_file, "BLOCK", block)  # 40 bytes: many blocks, and rows larger than one
    generator = torch.Generator().manual_seed(block)

    def number(limit: int) -> int:
        return int(torch.randint(limit + 1, (), generator=generator))

    shapes = [(), (9,), (7, 5), (4, 30), (30, 4), (5, 4, 3), (3, 8, 2), (0, 3), (3, 0)]
    for kind in (torch.bfloat16, torch.float32, torch.float16):
        entries = {str(shape): (kind, shape) for shape in shapes}
        expected = {name: torch.zeros(shape, dtype=kind) for name, (_, shape) in entries.items()}
        path = tmp_path / f"{kind}.safetensors"
        with SafetensorsFile.create(path, entries) as file:
            for name, (_, shape) in entries.items():
                for given in (kind, torch.float32, torch.bfloat16, torch.float64):
                    parts = {}
                    if shape and number(3):
                        parts["rows"] = slice(first := number(shape[0]), first + number(shape[0]))
                    if len(shape) > 1 and number(3):
                        parts["columns"] = slice(first := number(shape[1]), first + number(shape[1]))
                    whole = slice(None)
                    where = tuple(parts.get(name, whole) for name in ("rows", "columns"))[: len(shape)] or ...
                    target = expected[name][where]
                    tensor = torch.randn(target.shape[::-1], generator=generator).to(given)
                    # turned: the memory is in another order than the file
                    tensor = tensor.permute(*range(tensor.dim())[::-1]) if tensor.dim() else tensor
                    expected[name][where] = tensor.to(kind)
                    file.write(name, tensor.requires_grad_(), **parts)
        _same(path, expected)


def test_a_part_of_a_larger_memory_is_not_copied_whole(tmp_path):
    whole = torch.randn(64, 1000)
    entries = {"a": (torch.float32, (64, 500)), "b": (torch.bfloat16, (1000, 64))}
    with SafetensorsFile.create(tmp_path / "f.safetensors", entries) as file:
        file.write("a", whole[:, 250:750])
        file.write("b", whole.t())
    _same(tmp_path / "f.safetensors", {"a": whole[:, 250:750], "b": whole.t().bfloat16()})


def test_a_view_with_dimensions_of_its_own(tmp_path):
    """q of a fused qkv: [groups, heads a group, channels, hidden] in memory, [rows, hidden] in the file."""
    fused = torch.randn(4, 5, 8, 16)
    with SafetensorsFile.create(tmp_path / "f.safetensors", {"q": (torch.bfloat16, (4 * 3 * 8, 16))}) as file:
        file.write("q", fused[:2, :3], rows=slice(0, 48))
        file.write("q", fused[2:, :3], rows=slice(48, 96))
    _same(tmp_path / "f.safetensors", {"q": fused[:, :3].reshape(96, 16).bfloat16()})


def _write_share(path: Path, entries, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    with SafetensorsFile(path, entries) as file:
        for name, tensor in _numbered(entries).items():
            part = tensor.shape[-1] // size if name == "columns" else len(tensor) // size
            mine = slice(rank * part, (rank + 1) * part)
            if name == "columns":
                file.write(name, tensor[:, mine], columns=mine)
            else:
                file.write(name, tensor[mine], rows=mine)


def _numbered(entries) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (dtype, shape) in entries.items()}


def test_two_processes_write_one_file(tmp_path):
    entries = {
        "rows": (torch.bfloat16, (1001 * 2, 33)),  # parts end inside a page
        "columns": (torch.bfloat16, (1500, 70)),
        "cube": (torch.float32, (4, 9, 5)),
    }
    path = tmp_path / "model.safetensors"
    SafetensorsFile.create(path, entries).close()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_write_share, args=(path, entries, rank, 2)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    _same(path, _numbered(entries))
    write_safetensors(tmp_path / "alone.safetensors", entries, _numbered(entries).items())
    assert path.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_a_full_disk_fails_at_once_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError) as error:
        SafetensorsFile.create(path, {"a": (torch.bfloat16, (2**25, 2**25))})
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    assert not path.exists()

    def refuse(descriptor, offset, length):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    number = errno.ENOSPC  # a quota, or another writer
    with pytest.raises(OSError):
        SafetensorsFile.create(path, {"a": (torch.bfloat16, (2,))})
    assert not path.exists()
    number = errno.EOPNOTSUPP
    write_safetensors(path, {"a": (torch.bfloat16, (2,))}, [("a", torch.ones(2))])
    _same(path, {"a": torch.ones(2).bfloat16()})


def test_the_space_is_taken_at_once(tmp_path):
    path = tmp_path / "model.safetensors"
    SafetensorsFile.create(path, {"a": (torch.bfloat16, (2**20,))}).close()
    assert path.stat().st_size == file_size({"a": (torch.bfloat16, (2**20,))})
    assert path.stat().st_blocks * 512 >= 2**21
    assert not load_file(path)["a"].any()
