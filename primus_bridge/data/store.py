"""Samples on disk: flat .npy arrays written as they come and memory-mapped when read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEADER_BYTES = 128


@dataclass
class TokenizedDataset:
    """Samples as flat arrays, memory-mapped when they come from the cache.

    Sample i is ids[offsets[i]:offsets[i + 1]] with a loss weight a token: the weight of predicting that token, so the
    first of a sample is 0.
    """

    ids: np.ndarray
    """int32 [tokens]."""
    loss_weights: np.ndarray
    """uint8 [tokens]."""
    offsets: np.ndarray
    """int64 [samples + 1]."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], loss_weights uint8 [n]) of sample i."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        start, end = self.offsets[i], self.offsets[i + 1]
        return self.ids[start:end], self.loss_weights[start:end]

    @classmethod
    def open(cls, folder: Path, split: str) -> TokenizedDataset:
        """The arrays that a DatasetWriter of the same folder and split wrote."""
        parts = (np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ("ids", "loss_weights", "offsets"))
        return cls(*parts)


class _ArrayWriter:
    """A one-dimensional .npy file that grows; its header, of fixed size, is completed by ``close``."""

    def __init__(self, path: Path, dtype: type[np.generic]):
        self.dtype, self.count = np.dtype(dtype), 0
        self.file: BinaryIO = open(path, "wb")
        self.file.write(b"\0" * HEADER_BYTES)

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.count += len(values)

    def close(self) -> None:
        # the .npy format, version 1.0: magic, header length, a Python literal padded to a multiple of 64
        header = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self.count},), }}"
        header = header.ljust(HEADER_BYTES - 11) + "\n"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1"))
        self.file.close()


class DatasetWriter:
    """Writes the samples of one split, in order."""

    def __init__(self, folder: Path, split: str):
        self.ids = _ArrayWriter(folder / f"{split}.ids.npy", np.int32)
        self.loss_weights = _ArrayWriter(folder / f"{split}.loss_weights.npy", np.uint8)
        self.offsets = _ArrayWriter(folder / f"{split}.offsets.npy", np.int64)
        self.offsets.append(np.zeros(1, dtype=np.int64))
        self.largest_id = 0

    def add(self, ids: np.ndarray, loss_weights: np.ndarray) -> None:
        self.ids.append(ids)
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))
        self.loss_weights.append(loss_weights)
        self.offsets.append(np.array([self.ids.count]))

    def close(self) -> None:
        for array in (self.ids, self.loss_weights, self.offsets):
            array.close()
