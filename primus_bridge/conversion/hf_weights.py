"""HFWeights: the tensors of a Hugging Face folder, checked when it is opened and read by slices without a mapping."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Container, Mapping, Optional, Sequence

import torch

from primus_bridge.conversion.hf_folder import check_unquantised, quantised, read_json
from primus_bridge.conversion.safetensors_file import DTYPES, Region, as_bytes, read_raw_header
from primus_bridge.errors import ConfigError

INDEX = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"
BLOCK = 4 * 2**20
"""Bytes read at a time for columns: whole rows, of which the columns are kept. A read per row is no faster from the
page cache and 7 times slower from a disk, where it defeats reading ahead."""
GAP = 256 * 2**10
"""Bytes between the parts of two rows from which on skipping them is cheaper than reading them."""
QUANTISED_DTYPES = ("F8_", "F6_", "F4")
# what GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 checkpoints keep beside their weights
QUANTISED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".absmax",
    ".quant_map",
    ".SCB",
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is. offset: of its first byte in a safetensors file; None in a pickled one."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: Optional[int] = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, checked against the file's size.

    Raises ConfigError that names the file (and tensor) when it is truncated, damaged or not a safetensors file.
    """
    header, data, size = read_raw_header(path)
    tensors: dict[str, TensorInfo] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = all(type(number) is int and number >= 0 for number in (*shape, first, last)) and dtype + ""
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ConfigError(f"damaged header: tensor {name} is described as {entry!r}", where=str(path))
        if dtype.startswith(QUANTISED_DTYPES):
            raise quantised(f"tensor {name} has dtype {dtype}", path)
        if dtype not in DTYPES:
            raise ConfigError(f"tensor {name} has dtype {dtype}, which is not supported", where=str(path))
        tensor = TensorInfo(path, DTYPES[dtype], tuple(shape), data + first)
        needed = tensor.size
        if last - first != needed:
            raise ConfigError(
                f"damaged header: tensor {name}, {dtype} {shape}, takes {needed} bytes, its data_offsets "
                f"[{first}, {last}] hold {last - first}",
                where=str(path),
            )
        if data + last > size:
            raise ConfigError(
                f"truncated: tensor {name} ends at byte {data + last}, the file at {size}; fetch the file again",
                where=str(path),
            )
        tensors[name] = tensor
        if needed:
            spans.append((first, last, name))
    spans.sort()
    for (_, end, name), (begin, _, after) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise ConfigError(f"damaged header: tensors {name} and {after} overlap", where=str(path))
    return tensors


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.bin`` file, mapped and not read where its format allows (torch 1.6 and later).

    Nothing in the pickle is executed: torch's weights_only reader knows tensors and plain containers only. Raises
    ConfigError for anything else.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        zipped = magic.startswith(b"PK")
        if not zipped and not magic.startswith(b"\x80"):
            raise ConfigError(f"truncated or not a PyTorch weights file ({path.stat().st_size} bytes)", where=str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; a refusal is an error
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        # only what it names is passed on: torch's own advice is to execute it
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ConfigError(
            f"holds more than tensors{f' ({named[1]})' if named else ''}; a pickle like that is not executed: convert "
            "the model to safetensors where you trust it",
            where=str(path),
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise ConfigError(f"truncated or not a PyTorch weights file: {reason}", where=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if not isinstance(tensors, Mapping):
        raise ConfigError("holds no mapping of names and tensors", where=str(path))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{name} is no tensor but {type(tensor).__name__}", where=str(path))
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(f"tensor {name} has dtype {tensor.dtype}, which is not supported", where=str(path))
    return dict(tensors)


def weight_files(folder: Path) -> tuple[list[Path], Optional[Path], dict[str, str]]:
    """(the files that hold a folder's weights, its index or None, the index's weight_map), as transformers chooses.

    Safetensors before pickles, an index before names; ``model*.safetensors`` before others, such as the
    ``consolidated.safetensors`` with other tensor names that Mistral's releases hold too.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    for index in (folder / INDEX, folder / PICKLED_INDEX):
        if index.is_file() and (index.name == INDEX or not names):
            weight_map = _weight_map(index)
            if "model.safetensors" in names and "model.safetensors" not in weight_map.values():
                # transformers would read this one, other readers the others
                raise ConfigError(
                    f"beside it lies a model.safetensors that {index.name} does not name: remove one of the two",
                    where=str(index),
                )
            return [folder / name for name in sorted(set(weight_map.values()))], index, weight_map
    names = [name for name in names if name.startswith("model")] or names
    names = names or sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if not names:
        raise ConfigError("the model folder has no weights (*.safetensors or pytorch_model*.bin)", where=str(folder))
    return [folder / name for name in names], None, {}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError("weight_map is not an object of tensor names and file names", where=str(index))
    for tensor, name in weight_map.items():
        if Path(name).name != name:
            raise ConfigError(f"names a file outside the folder: {name!r} for tensor {tensor}", where=str(index))
    missing = sorted({name for name in weight_map.values() if not (index.parent / name).is_file()})
    if missing:
        raise ConfigError(f"names files that are not there: {', '.join(missing)}", where=str(index))
    if not weight_map:
        raise ConfigError("names no tensors", where=str(index))
    return weight_map


class HFWeights:
    """The tensors of a model folder, read by slices (a TensorReader).

    Opening reads and checks every header. Raises ConfigError for a folder without weights, an index that disagrees
    with the files, a truncated or damaged file, a tensor that two files hold, a quantised checkpoint.
    """

    def __init__(self, folder: Path, files: Optional[Sequence[Path]] = None):
        """files: what holds the tensors, where it is not a model's weights."""
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self._descriptors: dict[Path, int] = {}
        if files is None:
            check_unquantised(folder)
        paths, index, weight_map = weight_files(folder) if files is None else (files, None, {})
        for path in paths:
            found = read_header(path) if path.suffix == ".safetensors" else self._open_pickled(path)
            for name, info in found.items():
                if name in self.tensors:
                    raise ConfigError(f"tensor {name} is also in {self.tensors[name].file.name}", where=str(path))
                if name.endswith(QUANTISED_SUFFIXES):
                    raise quantised(f"tensor {name}", path)
                self.tensors[name] = info
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                place = f"; {self.tensors[name].file.name} does" if name in self.tensors else ""
                raise ConfigError(f"says that {file} holds tensor {name}, which it does not{place}", where=str(index))

    def complete_names(self, prefix: str, expected: Container[str]) -> None:
        """Give ``prefix`` back to the tensors whose names lack it and are expected to have it."""
        self.tensors = {
            prefix + name if name not in expected and prefix + name in expected else name: info
            for name, info in self.tensors.items()
        }
        self._pickled = {
            prefix + name if name not in expected and prefix + name in expected else name: tensor
            for name, tensor in self._pickled.items()
        }

    def _open_pickled(self, path: Path) -> dict[str, TensorInfo]:
        tensors = read_pickled(path)
        self._pickled.update(tensors)
        return {name: TensorInfo(path, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read(self, name: str, rows: Optional[slice] = None, columns: Optional[slice] = None) -> torch.Tensor:
        """The tensor, or its given rows (dimension 0) and columns (dimension 1), in memory of its own.

        The bytes go from the file straight to the result: nothing is mapped, and nothing else is held but, for
        columns, a block of 4 MiB. Raises ConfigError when the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        region = Region.of(info.shape, info.dtype.itemsize, rows, columns)
        result = torch.empty(region.shape, dtype=info.dtype)
        if info.offset is None:
            source = self._pickled[name]
            source = source if rows is None else source[rows]
            return result.copy_(source if columns is None else source[:, columns])
        if result.numel():
            try:
                self._read_region(self._descriptor(info.file), info.offset + region.start, region, as_bytes(result))
            except EOFError:
                raise ConfigError(f"truncated: tensor {name} ends after the file", where=str(info.file)) from None
        return result

    def read_bytes(self, name: str, first: int, last: int) -> bytes:
        """Bytes ``first`` to ``last`` of the tensor's elements in their order.

        Raises ConfigError when the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        if info.offset is None:
            return bytes(as_bytes(self._pickled[name].contiguous())[first:last])
        out = bytearray(last - first)
        try:
            _read_at(self._descriptor(info.file), memoryview(out), info.offset + first)
        except EOFError:
            raise ConfigError(f"truncated: tensor {name} ends after the file", where=str(info.file)) from None
        return bytes(out)

    @staticmethod
    def _read_region(descriptor: int, offset: int, region: Region, out: memoryview) -> None:
        run, stride = region.run, region.stride
        if region.count == 1 or stride > BLOCK or stride - run > GAP:
            for number in range(region.count):
                _read_at(descriptor, out[number * run : (number + 1) * run], offset + number * stride)
            return
        out_rows = torch.frombuffer(out, dtype=torch.uint8).view(region.count, run)
        block = torch.empty(min(region.count, BLOCK // stride), stride, dtype=torch.uint8)
        for first in range(0, region.count, len(block)):
            count = min(len(block), region.count - first)
            _read_at(descriptor, as_bytes(block)[: (count - 1) * stride + run], offset + first * stride)
            out_rows[first : first + count] = block[:count, :run]

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self):
        if hasattr(self, "_descriptors"):
            self.close()


def _read_at(descriptor: int, out: memoryview, offset: int) -> None:
    """Fill ``out``. Raises EOFError when the file ends before."""
    done = 0
    while done < len(out):  # one call reads at most 2 GiB
        count = os.preadv(descriptor, [out[done:]], offset + done)
        if not count:
            raise EOFError
        done += count
