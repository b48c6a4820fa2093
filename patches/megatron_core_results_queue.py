"""Megatron's checkpoint writer reports through a queue in this process, not through a server process of its own.

Our saves are synchronous: writer and reader of the queue are one process. The multiprocessing manager that
megatron.core starts for it costs a second at the first save, and outlives a rank that is killed or leaves with
os._exit: an orphan that holds the run's output streams open for ever, so that whoever reads them never sees their end.
"""

from __future__ import annotations

import queue

from primus_bridge.patching import Patch


def _apply() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


PATCH = Patch(
    id="megatron-core-results-queue",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="a synchronous save starts a manager process that outlives a killed rank",
    remove_when="megatron.core makes the manager for asynchronous saves only",
    condition=lambda device: (True, "saves are synchronous"),
    apply=_apply,
    order=70,
)
