"""Whether a checkpoint is whole: its files are there in their sizes and, read once more, have their checksums."""

from __future__ import annotations

import heapq
import os
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, TypeVar

from primus_bridge.checkpoint.manifest import (
    MANIFEST,
    OLD_FORMAT,
    Checkpoint,
    candidates,
    read_manifest,
    wrong_size,
)
from primus_bridge.errors import ConfigError
from primus_bridge.files import file_digest
from primus_bridge.together import gather
from primus_bridge.watchdog import wait_for_threads

Value = TypeVar("Value")

THREADS = 8
"""At most, of a process that reads files: hashing one takes a whole core."""
LARGE = 8 * 2**30
"""Bytes of a checkpoint whose reading takes long enough to be announced."""


def damage(
    checkpoint: Checkpoint,
    rank: int = 0,
    world_size: int = 1,
    verify: bool = True,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files, a finding each; together the ranks see them all.

    The manifest itself was checked as it was read (read_manifest).
    verify: read the files for their checksums, else only look at their sizes; older manifests have no checksums.
    progress: told of bytes that were read, by several threads.
    """
    manifest = checkpoint.manifest
    names = _shares(manifest.files, world_size)[rank]
    verify = verify and (manifest.format != OLD_FORMAT or manifest.checksum is not None)
    read = 0

    def has_read(count: int) -> None:
        nonlocal read
        read += count
        progress(count)

    with ThreadPoolExecutor(_threads()) as pool:
        found = [pool.submit(_wrong, checkpoint, name, verify, has_read) for name in names]
        wait_for_threads(lambda seconds: not wait(found, seconds).not_done, lambda: read, "part read")
        return [finding for one in found if (finding := one.result()) is not None]


def unlisted(checkpoint: Checkpoint) -> list[str]:
    """Files in a checkpoint's folder that its manifest does not name; nothing reads them."""
    inside = (path for path in checkpoint.folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(checkpoint.folder)) for path in inside}
    return sorted(names - set(checkpoint.manifest.files) - {MANIFEST})


def check_together(checkpoint: Checkpoint, verify: bool = True) -> list[str]:
    """What is wrong with a checkpoint, each rank reading its share: the whole list on every rank. Collective.

    One process alone reads everything.
    """
    return _examine(checkpoint.folder, verify).findings


def find_whole(path: Path, verify: bool = True) -> Checkpoint:
    """As manifest.find, and nothing is wrong with the checkpoint: of a save folder the newest such one. Collective.

    Rank 0 says which newer ones are damaged. Raises ConfigError, the same on every rank, when none is whole.
    """
    folders = _from_lead(lambda: candidates(path))
    for folder in folders:
        seen = _examine(folder, verify)
        if seen.checkpoint is not None and not seen.findings:
            return seen.checkpoint
        if seen.gone:
            raise removed_meanwhile(folder)
        if folder != folders[-1] and _place()[0] == 0:
            print(f"note: passing over {refusal(folder, seen.findings)}", file=sys.stderr, flush=True)
    raise refusal(folder, seen.findings)


def refusal(folder: Path, findings: list[str]) -> ConfigError:
    """The error of a checkpoint with such findings."""
    more = f" (and {len(findings) - 1} more: primus checkpoint verify)" if len(findings) > 1 else ""
    return ConfigError(f"damaged checkpoint: {findings[0]}{more}", where=str(folder))


def removed_meanwhile(folder: Path) -> ConfigError:
    """The error of a checkpoint that is there no more."""
    return ConfigError(
        "was removed while it was read: the run that writes it keeps only its newest checkpoints (save_total_limit); "
        "try again",
        where=str(folder),
    )


@dataclass(frozen=True)
class _Seen:
    """checkpoint: when this rank could open it; of any rank: what it finds wrong, and whether it finds none (gone)."""

    checkpoint: Optional[Checkpoint]
    findings: list[str]
    gone: bool


def _examine(folder: Path, verify: bool) -> _Seen:
    """Collective."""
    rank, world_size = _place()
    checkpoint = None
    try:
        checkpoint = Checkpoint(folder, read_manifest(folder))
        if verify and rank == 0:
            _announce(checkpoint)
        mine = damage(checkpoint, rank, world_size, verify)
    except ConfigError as error:
        mine = [f"{MANIFEST} {error.message}"]
    everybody = gather((mine, not (folder / MANIFEST).is_file()))
    findings = dict.fromkeys(finding for theirs, _ in everybody for finding in theirs)
    return _Seen(checkpoint, list(findings), any(gone for _, gone in everybody))


def _shares(files: Mapping[str, int], ranks: int) -> list[list[str]]:
    """Files by the rank that reads them, so that each reads about as many bytes."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]
    for name, size in sorted(files.items(), key=lambda item: (-item[1], item[0])):
        nbytes, rank = load[0]
        shares[rank].append(name)
        heapq.heapreplace(load, (nbytes + size, rank))
    return shares


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(THREADS, cores))


def _wrong(checkpoint: Checkpoint, name: str, verify: bool, progress: Callable[[int], Any]) -> Optional[str]:
    """What is wrong with a file; None for one that is whole."""
    wrong = wrong_size(checkpoint, name)
    if wrong is not None or not verify:
        return wrong
    expected = checkpoint.manifest.checksums.get(name)
    if expected is None:
        return f"{name} has no checksum in {MANIFEST}"
    try:
        found = file_digest(checkpoint.folder / name, progress)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if found == expected else f"{name} differs from its checksum"


def _announce(checkpoint: Checkpoint) -> None:
    nbytes = sum(checkpoint.manifest.files.values())
    if nbytes >= LARGE:
        print(
            f"reading {checkpoint.folder.name} against its checksums: {nbytes / 1e9:.1f} GB in "
            f"{len(checkpoint.manifest.files)} files (verify_checksums: false leaves it out)",
            flush=True,
        )


def _place() -> tuple[int, int]:
    """This process among those that check together: its rank, and how many they are."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _from_lead(value: Callable[[], Value]) -> Value:
    """What ``value()`` gives on rank 0, or the ConfigError that it raises there, on every rank. Collective."""
    found, error = None, None
    if _place()[0] == 0:
        try:
            found = value()
        except ConfigError as refused:
            error = refused
    found, error = gather((found, error))[0]
    if error is not None:
        raise error
    assert found is not None
    return found
