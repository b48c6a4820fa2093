"""Errors that all ranks raise together: what one rank finds wrong, every rank says, and none is left waiting."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, TypeVar

from primus_bridge.errors import ConfigError
from primus_bridge.files import write_error

Value = TypeVar("Value")

TELL_SECONDS = 60.0
"""Between two lines of a rank that waits for others."""


class SharedError(ConfigError):
    """A ConfigError that every rank of the job raises; one rank needs to say it."""


@contextmanager
def refusing_together(patient: bool = False) -> Iterator[None]:
    """A ConfigError inside, on any rank, becomes the same SharedError on all. Collective; a barrier without one.

    patient: what is inside may take another node hours longer than this one (its data is tokenised there): wait for
    all ranks without a collective, which would time out.
    """
    refusal = None
    try:
        yield
    except ConfigError as error:
        refusal = error
    if patient:
        _wait_for_all()
    _agree(refusal, refusal)


@contextmanager
def checking_together() -> Iterator[None]:
    """refusing_together before anything of Megatron is made: joins the job first. One rank by itself just goes on."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from primus_bridge.config.arguments import DistArguments
    from primus_bridge.megatron.parallel import initialize_distributed

    initialize_distributed(DistArguments())
    with refusing_together():
        yield


@contextmanager
def writing_together(what: str, where: Path, remove: Optional[Path]) -> Iterator[None]:
    """As refusing_together, for ranks that write: a full disk or a read-only folder counts too.

    remove: the folder being prepared, if any; after such a failure rank 0 removes it, and its space is free again. What
    is inside must reach its end on every rank without waiting for a rank that failed.
    """
    refusal, cause = None, None
    try:
        yield
    except Exception as error:
        refusal, cause = write_error(error, what, where), error
        if refusal is None:
            raise
    _agree(refusal, cause, remove)


def from_rank_0(value: Callable[[], Value]) -> Value:
    """What ``value()`` is on rank 0, on every rank. Collective."""
    import torch.distributed as dist

    box = [value() if dist.get_rank() == 0 else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def gather(value: Value) -> list[Value]:
    """The value of each rank, on every rank. Collective; one process without a group is alone."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def same_on_all(what: str, places: list[str]) -> None:
    """Raises SharedError when ranks found other places, as where nodes do not share a file system. Collective.

    what: they do with them.
    """
    found = gather(places)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            here, there = (", ".join(each) or "no checkpoint" for each in (found[0], theirs))
            raise SharedError(
                f"rank 0 would {what} {here}, rank {rank} {there}: all ranks must see the same folders; start again if "
                "a shared file system was only late"
            )


def _wait_for_all() -> None:
    """Until every rank is here, however long that takes; the job's store is asked, once in a while."""
    import torch.distributed as dist

    world, told = dist.get_world_size(), time.monotonic()
    if world == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    key = "primus_bridge/all_here"
    # the ranks before all came to an earlier wait
    whole = -(-store.add(key, 1) // world) * world
    pause = 0.01
    while (here := store.add(key, 0)) < whole:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
        if dist.get_rank() == 0 and time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"waiting for {whole - here} of {world} ranks, which still prepare", flush=True)


def _agree(mine: Optional[ConfigError], cause: Optional[Exception], remove: Optional[Path] = None) -> None:
    import torch.distributed as dist

    refusals: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, None if mine is None else (mine.message, mine.where))
    for rank, refusal in enumerate(refusals):
        if refusal is None:
            continue
        if remove is not None and dist.get_rank() == 0:
            shutil.rmtree(remove, ignore_errors=True)
        message, where = refusal
        raise SharedError(message if rank == 0 else f"{message} (seen by rank {rank})", where=where) from cause
