"""A safetensors file: its header, and writing it by regions, by several processes at once and without a second copy."""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional

import torch

from primus_bridge.errors import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt", "writer": "primus_bridge"}
"""In the header of every safetensors file written here; transformers asks for the first."""
LONGEST_HEADER = 100 * 10**6  # as the reference reader has it
BLOCK = 8 * 2**20  # bytes that are cast or made contiguous at a time: so few that malloc gives the same memory again

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def read_raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(the header as it stands in the file, where the data starts, the file's size).

    Raises ConfigError when the file is truncated within its header or is no safetensors file.
    Format: 8 bytes little-endian header length, JSON header, data; https://huggingface.co/docs/safetensors
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= size - 8:
                raise ConfigError(f"truncated or not a safetensors file ({size} bytes)", where=str(path))
            if length > LONGEST_HEADER:
                raise ConfigError(f"not a safetensors file: a header of {length} bytes", where=str(path))
            header = json.loads(file.read(length))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigError("not a safetensors file: its header is not JSON", where=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if not isinstance(header, dict):
        raise ConfigError("not a safetensors file: its header is no JSON object", where=str(path))
    return header, 8 + length, size


@dataclass(frozen=True)
class Region:
    """Rows and columns of a stored tensor: ``count`` runs of ``run`` bytes, ``stride`` bytes from one to the next.

    shape: of the region; start: bytes from the tensor's first byte to the region's. Rows are dimension 0, columns
    dimension 1; what lies in one piece is one run.
    """

    shape: tuple[int, ...]
    start: int
    count: int
    run: int
    stride: int

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @classmethod
    def of(
        cls, shape: tuple[int, ...], itemsize: int, rows: Optional[slice] = None, columns: Optional[slice] = None
    ) -> Region:
        row = _bytes(shape[1:], itemsize)
        cell = _bytes(shape[2:], itemsize)
        first_row, row_count = _span(rows, shape[0]) if rows is not None else (0, shape[0] if shape else 1)
        if columns is None:
            inner = (row_count, *shape[1:]) if shape else ()
            return cls(inner, first_row * row, 1, row_count * row, row_count * row)
        first_column, column_count = _span(columns, shape[1])
        inner = (row_count, column_count, *shape[2:])
        start = first_row * row + first_column * cell
        if column_count == shape[1]:
            return cls(inner, start, 1, row_count * row, row_count * row)
        return cls(inner, start, row_count, column_count * cell, row)


def _span(part: slice, length: int) -> tuple[int, int]:
    """(first, count) of a slice, as indexing would take it."""
    start, stop, step = part.indices(length)
    assert step == 1, part
    return start, max(0, stop - start)


def _bytes(shape: tuple[int, ...], itemsize: int) -> int:
    return itemsize * int(torch.Size(shape).numel())


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a tensor of one element is contiguous whatever its strides
    return flat.view(torch.uint8).numpy().data


def _layout(entries: Entries) -> tuple[bytes, dict[str, int], int]:
    """(the file's first bytes, where each tensor starts in the file, the file's size)."""
    header: dict[str, Any] = {"__metadata__": METADATA}
    offsets = {}
    offset = 0
    # the widest dtype first keeps every tensor aligned, as the reference writer does
    for name, (dtype, shape) in sorted(entries.items(), key=lambda entry: -entry[1][0].itemsize):
        end = offset + _bytes(shape, dtype.itemsize)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offsets[name] = offset
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = 8 + len(encoded)
    return struct.pack("<Q", len(encoded)) + encoded, {name: data + o for name, o in offsets.items()}, data + offset


def file_size(entries: Entries) -> int:
    """Bytes of the file that ``SafetensorsFile.create`` makes."""
    return _layout(entries)[2]


class SafetensorsFile:
    """A file of known entries, open for writing; closed with its bytes on the disk (fsync).

    ``create`` makes the file: header and full size. Then any number of processes open it with the same entries and
    write disjoint regions, in any order; a region that nobody writes is zeros.
    """

    def __init__(self, path: Path, entries: Entries):
        self.path, self.entries = path, entries
        _, self._offsets, size = _layout(entries)
        # write only: a network file system may read and write back whole pages of a file that is open for reading too,
        # and with them what another node has just written beside this rank's bytes
        self._descriptor: Optional[int] = os.open(path, os.O_WRONLY)
        assert os.fstat(self._descriptor).st_size == size, f"{path} was created with other entries"

    @classmethod
    def create(cls, path: Path, entries: Entries) -> SafetensorsFile:
        """Write the header and reserve the space of the data: a full disk is an OSError here, and leaves no file."""
        header, _, size = _layout(entries)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _reserve(descriptor, size, path)
            _write_runs(descriptor, memoryview(header), 0, len(header), 0, 0)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        return cls(path, entries)

    def write(
        self, name: str, tensor: torch.Tensor, rows: Optional[slice] = None, columns: Optional[slice] = None
    ) -> None:
        """Write a tensor, or its given rows (dimension 0) and columns (dimension 1), cast to the entry's dtype.

        tensor: the region's elements in their order; it may have other dimensions, such as heads apart from rows.
        Only the region's own bytes are touched. Straight from the tensor's memory where it lies as the file has it;
        else (another dtype, device or order of dimensions) by blocks of 8 MiB.
        """
        dtype, shape = self.entries[name]
        region = Region.of(shape, dtype.itemsize, rows, columns)
        assert tensor.numel() == region.elements, (name, tensor.shape, region.shape)
        assert self._descriptor is not None, f"{self.path} is closed"
        first = self._offsets[name] + region.start
        written = 0
        for block in _contiguous_blocks(tensor.detach(), dtype):
            written += _write_runs(self._descriptor, as_bytes(block), first, region.run, region.stride, written)

    def close(self, fsync: bool = True) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            if fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def __del__(self):
        if getattr(self, "_descriptor", None) is not None:
            self.close(fsync=False)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self.close(fsync=kind is None)


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Give an empty file its size and, where the file system can, its space."""
    disk = os.fstatvfs(descriptor)
    if disk.f_bavail * disk.f_frsize < size:
        # asked first: fallocate would take all that is left before it finds that it is too little
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _write_runs(descriptor: int, data: memoryview, first: int, run: int, stride: int, position: int) -> int:
    """Write ``data`` from the byte ``position`` of all runs on, of which the first starts at ``first``; its length."""
    done, size = 0, len(data)
    while done < size:
        number, inside = divmod(position + done, run)
        # one call writes at most 2 GiB, and may write less
        done += os.pwrite(descriptor, data[done : done + run - inside], first + number * stride + inside)
    return size


def _contiguous_blocks(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """``tensor`` in its order as contiguous pieces of ``dtype`` on the CPU."""
    size = tensor.numel()
    most = max(1, BLOCK // max(dtype.itemsize, tensor.element_size()))
    if tensor.is_contiguous() and tensor.dtype == dtype and tensor.device.type == "cpu":
        yield tensor
    elif tensor.is_contiguous():
        for block in tensor.view(-1).split(most):
            yield block.to(dtype).cpu()
    elif size <= most:
        yield tensor.to(dtype).contiguous().cpu()
    else:
        rows = most // (size // len(tensor))
        for part in tensor.split(rows) if rows else tensor.unbind():
            yield from _contiguous_blocks(part, dtype)


def write_safetensors(path: Path, entries: Entries, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write one file as a stream: ``tensors`` yields (name, tensor) in the order of ``entries``, one at a time.

    Memory stays at one tensor however large the file is. Raises OSError when the disk is full, before any tensor.
    """
    with SafetensorsFile.create(path, entries) as file:
        for expected, (name, tensor) in zip(entries, tensors, strict=True):
            assert name == expected, (name, expected)
            file.write(name, tensor)
