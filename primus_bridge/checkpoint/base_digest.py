"""A digest of the weights under an adapter, by which a run that goes on knows its base again wherever it lies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from primus_bridge.checkpoint.manifest import OLD_FORMAT, Checkpoint
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.conversion.rules import expected_hf_tensors
from primus_bridge.errors import ConfigError
from primus_bridge.files import looks_like_path

SAMPLE_BYTES = 4096
SAMPLES = 4
"""Pieces of a tensor that are read: its first and last bytes, and as many between as make this number."""


def base_digest(base: HFModel | Checkpoint) -> Optional[str]:
    """ "hf:" or "megatron:" and a SHA-256 in hexadecimal digits; None for a checkpoint that has no checksums.

    Of a Hugging Face folder: the decoder's tensors by name, dtype and shape, and 16 KiB of each, however they are cut
    into files. Another fine-tuning of the model has other bytes in some of them; a change of single rows or values
    between the samples is not seen. Of a converted checkpoint: its Hugging Face model's. Of a trained one: its
    manifest's checksums, so every byte of it.
    Raises ConfigError for a folder whose weights are missing or damaged.
    """
    if isinstance(base, HFModel):
        return f"hf:{_folder_digest(base)}"
    manifest = base.manifest
    if manifest.step == 0 and manifest.base_digest is not None:
        return manifest.base_digest
    if not manifest.checksums:
        return None
    return f"megatron:{_sha256(json.dumps(sorted(manifest.checksums.items())))}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _folder_digest(model: HFModel) -> str:
    weights = model.weights()
    digest = hashlib.sha256()
    for name in sorted(expected_hf_tensors(model.family.rules, model.architecture)):
        info = weights.tensors[name]
        digest.update(json.dumps([name, str(info.dtype), list(info.shape)]).encode())
        for first, last in samples(info.size):
            digest.update(weights.read_bytes(name, first, last))
    weights.close()
    return digest.hexdigest()


def samples(size: int) -> list[tuple[int, int]]:
    """(first, last) of the bytes that are read of ``size``: all of a small tensor."""
    if size <= SAMPLES * SAMPLE_BYTES:
        return [(0, size)]
    starts = [(size - SAMPLE_BYTES) * number // (SAMPLES - 1) for number in range(SAMPLES)]
    return [(start, start + SAMPLE_BYTES) for start in starts]


@dataclass(frozen=True)
class OtherBase:
    """What is to be said of the weights under an adapter. certain: they are others; else they could not be compared."""

    what: str
    certain: bool


def other_base(adapter: Checkpoint, name: str, digest: Optional[str]) -> Optional[OtherBase]:
    """How the weights ``name`` of ``digest`` differ from those that an adapter was trained over; None: not at all."""
    manifest = adapter.manifest
    if digest is None or manifest.base_digest is None:
        whose = adapter.folder if manifest.base_digest is None else name
        why = f"{whose} has no digest of the base (an older version's)"
        if manifest.base_digest is None and manifest.step == 0 and manifest.format != OLD_FORMAT:
            why = f"{whose} was imported without its base's weights"
        return OtherBase(f"{why}: {name} is not compared", False)
    if digest == manifest.base_digest:
        return None
    what = f"{name} ({short(digest)}) in place of {manifest.base} ({short(manifest.base_digest)})"
    return OtherBase(f"other weights under the adapter than it was trained over: {what}", True)


def check_base_is_there(base: Optional[str], adapter: Path, options: str) -> None:
    """Raises ConfigError for an adapter's base that is meant as a place on disk, where there is nothing.

    options: what names another place.
    """
    if base is not None and looks_like_path(base) and not Path(base).expanduser().is_dir():
        raise ConfigError(
            f"the base under its adapter, {base}, is not there (moved?); name where it is now: {options}",
            where=str(adapter),
        )


def short(digest: str) -> str:
    """hf:0123456789ab"""
    kind, _, digits = digest.partition(":")
    return f"{kind}:{digits[:12]}"
