"""What a state holds, leaf by leaf: a path, a kind and a checksum each, by which ranks compare theirs."""

from __future__ import annotations

import hashlib
from typing import Any, Iterator, Mapping, NamedTuple, Optional

import numpy as np
import torch

CHUNK = 64 * 2**20
"""Bytes of a tensor that are hashed, or sent to other ranks, at a time."""

LeafPath = tuple[str, ...]
"""From a component to a leaf, the component's key first: each key and index as its repr, so that 0 is not "0"."""


class Unknown(NamedTuple):
    """A leaf that cannot be compared, and what it is."""

    what: str


class Summary(NamedTuple):
    """Of a leaf: ``kind`` is for people (a dtype and shape, a value), ``content`` tells it from others of that kind."""

    kind: str
    content: bytes
    known: bool = True
    """False: it cannot be compared, and ``kind`` is what it is."""


def leaves(state: Any, path: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    """Every mapping, list and tuple of ``state``, each before what it holds, and all else in it, with its path.

    What cannot be compared comes as Unknown.
    """
    yield path, _refused(state) or state
    if isinstance(state, Mapping):
        for key, value in state.items():
            if _plain(key) is None:
                yield (*path, repr(key)), Unknown(f"a key of type {_type(key)}")
            else:
                yield from leaves(value, (*path, repr(key)))
    elif isinstance(state, (list, tuple)) and not isinstance(state, torch.Size):
        for index, value in enumerate(state):
            yield from leaves(value, (*path, repr(index)))


def name_of(path: LeafPath) -> str:
    """As people write it: ``optimizer.state.0.exp_avg``."""
    return ".".join(part.strip("'\"") for part in path)


def _type(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _refused(value: Any) -> Optional[Unknown]:
    if isinstance(value, torch.Tensor):
        if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return Unknown(f"of type {_type(value)}")  # its bytes are those of other tensors inside it
        if value.is_meta or value.layout is not torch.strided:
            return Unknown(f"a {'meta' if value.is_meta else str(value.layout).removeprefix('torch.')} tensor")
        return None
    if isinstance(value, np.ndarray):
        return Unknown("an array of Python objects") if value.dtype.hasobject else None
    if isinstance(value, (Mapping, list, tuple)) or _plain(value) is not None:
        return None
    return Unknown(f"of type {_type(value)}")


def _plain(value: Any) -> Optional[bytes]:
    """Bytes that tell a plain value from every other, its type included; None for what is no plain value."""
    if isinstance(value, np.generic):  # before float, of which numpy.float64 is one
        content = repr((value.dtype.str, value.tobytes()))
    elif isinstance(value, (float, complex)):
        content = repr(np.array(value).tobytes())
    elif value is None or isinstance(value, (int, str, bytes, bytearray, torch.dtype, torch.Size)):
        content = repr(value)
    elif isinstance(value, (tuple, set, frozenset)):
        parts = [_plain(part) for part in value]
        if None in parts:
            return None
        content = repr(parts if isinstance(value, tuple) else sorted(part for part in parts if part))
    else:
        return None
    return f"{_type(value)} {content}".encode()


def summarise(key: str, state: Any, level: str) -> dict[LeafPath, Summary]:
    """A Summary of every leaf of a component's state.

    level: none (of tensors, dtype and shape only), quick or tensor, as in replication.py.
    """
    found: dict[LeafPath, Summary] = {}
    sums: dict[torch.device, dict[LeafPath, torch.Tensor]] = {}
    for path, value in leaves(state, (repr(key),)):
        found[path] = _summary(value, level)
        if isinstance(value, torch.Tensor) and level == "quick":
            sums.setdefault(value.device, {})[path] = _word_sum(bytes_of(value))
    for device_sums in sums.values():
        # one copy to the host for all tensors of a device
        for path, total in zip(device_sums, torch.stack(list(device_sums.values())).tolist(), strict=True):
            found[path] = found[path]._replace(content=str(total).encode())
    return found


def _summary(value: Any, level: str) -> Summary:
    if isinstance(value, Unknown):
        return Summary(value.what, b"", known=False)
    if isinstance(value, torch.Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return Summary(kind, _sha256(bytes_of(value)) if level == "tensor" else b"")
    if isinstance(value, np.ndarray):
        return Summary(f"array {value.dtype.str} {list(value.shape)}", hashlib.sha256(value.tobytes()).digest())
    plain = _plain(value) if not isinstance(value, (Mapping, list, tuple)) or isinstance(value, torch.Size) else None
    if plain is None:
        return Summary(_type(value), b"")
    shown = repr(value)
    return Summary(shown if len(shown) <= 40 else shown[:37] + "...", plain)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in the order of its elements, on its device, [bytes]: a view where its memory has that order."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    return flat if flat.storage_offset() % 8 == 0 else flat.clone()  # so that words can view it


def words(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes as 8-byte integers, which processors add and compare ten times as fast, and what is left of them."""
    whole = len(data) // 8 * 8
    return data[:whole].view(torch.int64), data[whole:]


def _word_sum(data: torch.Tensor) -> torch.Tensor:
    whole, rest = words(data)
    return whole.sum() + rest.sum(dtype=torch.int64)


def _sha256(data: torch.Tensor) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, len(data), CHUNK):
        digest.update(data[start : start + CHUNK].cpu().numpy().data)
    return digest.digest()
