"""This process as one rank of a job that torchrun or Slurm started."""

from __future__ import annotations

import os
from typing import Callable

from primus_bridge.errors import ConfigError


def as_one_rank(work: Callable[[], object]) -> int:
    """Run ``work`` in this rank; the exit code. What all ranks found together, rank 0 says (raises) alone."""
    from primus_bridge.launch.local import EXIT_USER_ERROR, quiet_upstream
    from primus_bridge.together import SharedError

    quiet_upstream()
    rank = int(os.environ["RANK"])
    try:
        work()
    except SharedError:
        if rank == 0:
            raise
        return EXIT_USER_ERROR
    except ConfigError as error:
        if rank == 0:
            raise
        raise ConfigError(f"rank {rank}: {error}") from None
    return 0
