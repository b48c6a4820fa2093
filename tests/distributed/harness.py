"""Real gloo ranks for tests: a function runs on N processes of one job, forked from a server that imported torch once.

``run_distributed(function, world_size, *args)`` returns what each rank returned. The function must be importable
(module level) and its arguments and result picklable. The ranks stand in the test's folder, with its environment.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import time
import traceback
from typing import Any, Callable, Iterator, NamedTuple

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.preload"])


class Job(NamedTuple):
    """Ranks that were started: their processes, the queue of what they leave, and the store in which they meet."""

    ranks: list
    results: Any
    store: Any


def meeting_point() -> tuple[Any, dict[str, str]]:
    """(a store, the variables by which the ranks of one job find it); it must live as long as they do.

    Held by this process, as torch's launcher does: a port that is only chosen here may be taken before rank 0 listens.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank(function: Callable, rank: int, world_size: int, place: tuple, args: tuple, results) -> None:
    import torch

    # the fork server has those of the test that came first
    folder, environment = place
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine's own name may not resolve
    torch.set_num_threads(1)
    try:
        # bytes, not tensors: the queue would share their memory, which ends with this process
        value = io.BytesIO()
        torch.save(function(*args), value)
        results.put((rank, True, value.getvalue()))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _results(results, ranks: list, deadline: float) -> Iterator[tuple[int, bool, Any]]:
    """(rank, whether it succeeded, what it left) in the order they end."""
    missing = dict(enumerate(ranks))
    while missing:
        # asked before the queue is: what an ended process has left is in the queue by then
        ended = {rank: process.exitcode for rank, process in missing.items() if process.exitcode is not None}
        try:
            result = results.get(timeout=0.5)
        except queue.Empty:
            for rank, code in ended.items():
                raise AssertionError(
                    f"rank {rank} of {len(ranks)} ended with exit code {code}, without a result"
                ) from None
            if time.monotonic() > deadline:
                raise
            continue
        del missing[result[0]]
        yield result


def start_ranks(function: Callable, world_size: int, *args: Any) -> Job:
    """For a test that ends ranks itself."""
    store, variables = meeting_point()
    place = (os.getcwd(), {**os.environ, **variables})
    results = _context.Queue()
    ranks = [
        _context.Process(target=_rank, args=(function, rank, world_size, place, args, results))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return Job(ranks, results, store)


def run_distributed(function: Callable, world_size: int, *args: Any, timeout: float = 480) -> list[Any]:
    """Results by rank. Raises AssertionError with the traceback of the first rank that failed, or that ended without
    a result; after ``timeout`` seconds queue.Empty."""
    import torch

    job = start_ranks(function, world_size, *args)
    gathered: dict[int, Any] = {}
    try:
        for rank, ok, value in _results(job.results, job.ranks, time.monotonic() + timeout):
            assert ok, f"rank {rank} of {world_size} failed:\n{value}"
            gathered[rank] = torch.load(io.BytesIO(value), weights_only=False)  # written by our own ranks
    finally:
        for process in job.ranks:
            process.join(timeout=10 if len(gathered) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [gathered[rank] for rank in range(world_size)]
