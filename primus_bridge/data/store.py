"""Samples on disk: flat .npy arrays written as they come and memory-mapped when read; and packs of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

HEADER_BYTES = 128


class Origin(NamedTuple):
    """Where a sample comes from."""

    source: int
    """Index into the run's sources."""
    row: int
    """Index of the row in the source, from 0."""
    part: int
    """Which of the row's conversations."""


@dataclass
class TokenizedDataset:
    """Samples as flat arrays, memory-mapped when they come from the cache, and the sequences to train on.

    Sample i is ids[offsets[i]:offsets[i + 1]] with a loss weight a token: the weight of predicting that token, so the
    first of a sample is 0. A sequence is one sample, or when ``pack_offsets`` is given the samples
    pack_samples[pack_offsets[k]:pack_offsets[k + 1]].
    """

    ids: np.ndarray
    """int32 [tokens]."""
    loss_weights: np.ndarray
    """float32 [tokens]."""
    offsets: np.ndarray
    """int64 [samples + 1]."""
    origins: np.ndarray | None = None
    """int64 [samples * 3]: an Origin each."""
    pack_samples: np.ndarray | None = None
    """int64 [samples of all sequences]; a sample may come more than once, by its source's weight."""
    pack_offsets: np.ndarray | None = None
    """int64 [sequences + 1]; None: a sequence a sample, in the order of pack_samples when given."""
    digest: str | None = None
    """``content_digest``, where a checkpoint's place in the data goes by it."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], loss_weights float32 [n]) of sample i."""
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        start, end = self.offsets[i], self.offsets[i + 1]
        return self.ids[start:end], self.loss_weights[start:end]

    def origin(self, i: int) -> Origin:
        """Where sample i comes from."""
        assert self.origins is not None
        return Origin(*self.origins[3 * i : 3 * i + 3].tolist())

    @property
    def packed(self) -> bool:
        return self.pack_offsets is not None

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        if self.pack_offsets is not None:
            return len(self.pack_offsets) - 1
        return len(self) if self.pack_samples is None else len(self.pack_samples)

    def members(self, sequence: int) -> np.ndarray:
        """The samples of a sequence, int64."""
        if self.pack_offsets is not None:
            assert self.pack_samples is not None
            return self.pack_samples[self.pack_offsets[sequence] : self.pack_offsets[sequence + 1]]
        return np.array([sequence]) if self.pack_samples is None else self.pack_samples[sequence : sequence + 1]

    def inputs(self, sequence: int) -> int:
        """Model inputs of a sequence: a sample of n tokens is n - 1 (its last token is only a target)."""
        members = self.members(sequence)
        return int((self.offsets[members + 1] - self.offsets[members] - 1).sum())

    def tokens(self, sequence: int) -> int:
        """Tokens of a sequence."""
        members = self.members(sequence)
        return int((self.offsets[members + 1] - self.offsets[members]).sum())

    def content_digest(self) -> str:
        """sha256 of the tokens of each sequence, wherever the data lies; their loss weights move no place in it."""
        digest = hashlib.sha256()
        for array in (self.ids, self.offsets, self.pack_samples, self.pack_offsets):
            digest.update(f"{None if array is None else len(array)},".encode())
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @classmethod
    def open(cls, folder: Path, split: str) -> TokenizedDataset:
        """The arrays that a DatasetWriter of the same folder and split, and save_sequences, wrote."""

        def load(name: str) -> np.ndarray:
            return np.load(folder / f"{split}.{name}.npy", mmap_mode="r")

        def optional(name: str) -> np.ndarray | None:
            return load(name) if (folder / f"{split}.{name}.npy").exists() else None

        return cls(
            load("ids"),
            load("loss_weights"),
            load("offsets"),
            load("origins"),
            optional("pack_samples"),
            optional("pack_offsets"),
        )


def save_sequences(folder: Path, split: str, samples: np.ndarray, packs: list[list[int]] | None) -> None:
    """Write which samples make the sequences of an epoch: ``samples`` one each, or in packs (indices into samples)."""
    if packs is not None:
        sizes = np.array([len(members) for members in packs], dtype=np.int64)
        order = np.fromiter((i for members in packs for i in members), dtype=np.int64, count=int(sizes.sum()))
        np.save(folder / f"{split}.pack_offsets.npy", np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        samples = samples[order]
    np.save(folder / f"{split}.pack_samples.npy", samples.astype(np.int64))


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
        self.loss_weights = _ArrayWriter(folder / f"{split}.loss_weights.npy", np.float32)
        self.offsets = _ArrayWriter(folder / f"{split}.offsets.npy", np.int64)
        self.origins = _ArrayWriter(folder / f"{split}.origins.npy", np.int64)
        self.offsets.append(np.zeros(1, dtype=np.int64))
        self.largest_id = 0

    def add(self, ids: np.ndarray, loss_weights: np.ndarray, origin: Origin) -> None:
        self.ids.append(ids)
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))
        self.loss_weights.append(loss_weights)
        self.offsets.append(np.array([self.ids.count]))
        self.origins.append(np.array(origin))

    def close(self) -> None:
        for array in (self.ids, self.loss_weights, self.offsets, self.origins):
            array.close()
