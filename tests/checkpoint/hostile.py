"""Checkpoints that mean harm: files of a committed checkpoint replaced by pickles that would run a command."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from primus_bridge.checkpoint.manifest import MANIFEST, manifest_checksum


class Command:
    """Pickles to a call of os.system."""

    def __init__(self, line: str):
        self.line = line

    def __reduce__(self):
        return os.system, (self.line,)


def poison(checkpoint: Path, name: str, command: Command) -> None:
    """Put ``command`` in place of a file of ``checkpoint``, whose manifest then fits."""
    file = checkpoint / name
    if name == ".metadata":
        file.write_bytes(pickle.dumps(command))
    else:
        torch.save({"common": command}, file)
    recommit(checkpoint)


def poison_entry(checkpoint: Path, entry: str, command: Command) -> None:
    """Put ``command`` in place of an entry of the shards, a tensor or bytes."""
    stream = io.BytesIO()
    torch.save(command, stream)
    index = read_index(checkpoint)
    key = next(key for key in index.storage_data if key.fqn == entry)
    shard = checkpoint / index.storage_data[key].relative_path
    place = replace(index.storage_data[key], offset=shard.stat().st_size, length=len(stream.getvalue()))
    shard.write_bytes(shard.read_bytes() + stream.getvalue())
    index.storage_data[key] = place
    write_index(checkpoint, index)


def read_index(checkpoint: Path) -> Any:
    return pickle.loads((checkpoint / ".metadata").read_bytes())  # of a checkpoint of our own


def write_index(checkpoint: Path, index: Any) -> None:
    (checkpoint / ".metadata").write_bytes(index if isinstance(index, bytes) else pickle.dumps(index))
    recommit(checkpoint)


def recommit(checkpoint: Path, **changes: Any) -> None:
    """Make the manifest fit the files, and change it."""
    values = json.loads((checkpoint / MANIFEST).read_text())
    for name in values["files"]:
        data = (checkpoint / name).read_bytes()
        values["files"][name], values["checksums"][name] = len(data), hashlib.sha256(data).hexdigest()
    values.update(changes)
    (checkpoint / MANIFEST).write_text(json.dumps(values | {"checksum": manifest_checksum(values)}))
