"""Saves that fail: whatever goes wrong on one rank, all ranks hear of it, and the checkpoints before stand."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from primus_bridge.checkpoint.components import StateComponent
from primus_bridge.errors import ConfigError
from primus_bridge.files import write_error
from primus_bridge.together import SharedError, writing_together

WHAT = "a checkpoint"


class SaveFailed(SharedError):
    """A checkpoint could not be written; those before it stand. Raised on every rank."""


@contextmanager
def failing(folder: Path, removes: bool = True) -> Iterator[None]:
    """An exception inside, on any rank, becomes the same SaveFailed on all. Collective.

    removes: the checkpoint being prepared in ``folder`` goes then.
    """
    try:
        with writing_together(WHAT, folder, remove=folder if removes else None):
            try:
                yield
            except Exception as error:
                raise write_failure(error, folder) from error
    except SharedError as error:
        raise SaveFailed(error.message, where=error.where) from error


def write_failure(error: BaseException, folder: Path) -> ConfigError:
    """What is said of an exception that ended the writing of a checkpoint."""
    if isinstance(error, Exception) and (known := write_error(error, WHAT, folder)) is not None:
        return known
    return ConfigError(f"cannot write {WHAT}: {type(error).__name__}: {error}", where=str(folder))


@contextmanager
def asking(component: StateComponent, method: str) -> Iterator[None]:
    """A component's own failure, on whichever rank, is one that all ranks can raise together."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        who = type(component.stateful).__name__
        raise ConfigError(
            f"{who}.{method} failed: {type(error).__name__}: {error}", where=f"state component {component.key!r}"
        ) from error
