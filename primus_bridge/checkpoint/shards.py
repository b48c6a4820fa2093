"""The tensors of a torch_dist checkpoint, read part by part by one process, without a model: torch's format."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from primus_bridge.checkpoint.safe_load import load_plain, read_index
from primus_bridge.errors import ConfigError

INDEX = ".metadata"

Box = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A box inside a tensor: its first element and its sizes, a number a dimension."""

    offsets: Box
    sizes: Box

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def overlap(self, other: Region) -> Optional[Region]:
        """What both have; None when there is nothing."""
        first = tuple(map(max, self.offsets, other.offsets))
        ends = [(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)]
        sizes = tuple(min(end) - start for end, start in zip(ends, first, strict=True))
        return Region(first, sizes) if all(size > 0 for size in sizes) else None

    def of(self, part: Region, values: torch.Tensor) -> torch.Tensor:
        """This region, cut out of the values of a part that contains it."""
        for dim, (start, first, size) in enumerate(zip(self.offsets, part.offsets, self.sizes, strict=True)):
            values = values.narrow(dim, start - first, size)
        return values


@dataclass(frozen=True)
class Stored:
    """A tensor: its global shape, dtype, and the parts that ranks saved."""

    shape: Box
    dtype: torch.dtype
    parts: list[Region]


class Shards:
    """A checkpoint folder's tensors and objects by name, as its index has them. Raises ConfigError for a damaged one.

    Source of the format: torch.distributed.checkpoint.filesystem.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / INDEX
        try:
            with path.open("rb") as stream:
                index = read_index(stream, str(path))
        except FileNotFoundError:
            raise ConfigError("holds no tensors: it has no index (.metadata)", where=str(folder)) from None
        self.tensors: dict[str, Stored] = {}
        self.objects: list[str] = []
        for name, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                parts = [Region(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
                self.tensors[name] = Stored(tuple(entry.size), entry.properties.dtype, parts)
            else:
                self.objects.append(name)
        self._places = {
            (key.fqn, None if key.offset is None else tuple(key.offset)): place
            for key, place in index.storage_data.items()
        }
        self._last: tuple[Any, Any] = (None, None)

    def kind(self, name: str) -> str:
        """Dtype and shape of a tensor: ``float32 [64, 96]``."""
        tensor = self.tensors[name]
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

    def parts(self, name: str) -> list[Region]:
        return self.tensors[name].parts

    def stored(self, name: str, offsets: Optional[Box] = None) -> bytes:
        """The bytes of an object, or of the part of a tensor that begins at ``offsets``."""
        place = self._places.get((name, offsets))
        if place is None:
            raise ConfigError(f"damaged checkpoint: its index does not say where {name} lies", where=str(self.folder))
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                return file.read(place.length)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None

    def load(self, name: str, offsets: Optional[Box] = None) -> Any:
        """The value of an object or of a part of a tensor, on the CPU; the last one is kept for the next call."""
        if self._last[0] != (name, offsets):
            self._last = (None, None)  # the one before goes first: a part may be gigabytes
            value = load_plain(io.BytesIO(self.stored(name, offsets)), f"{name} in {self.folder}")
            self._last = ((name, offsets), value)
        return self._last[1]
