"""--profile: torch's profiler over some steps of a run: a Chrome trace and a table of operations a rank."""

from __future__ import annotations

import os
import sys
from typing import Any, Optional

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.files import write_text
from primus_bridge.megatron.phases import Phases, listen

FOLDER, TRACE = "profile", "rank_{:04d}.json.gz"
ROWS = 30
"""Operations of the table."""
NAMES = {"forward-compute": "forward", "backward-compute": "backward"}
"""Of Megatron's parts of a step, those that the trace names otherwise."""


def profiled_steps(arguments: BridgeArguments, start_step: int) -> range:
    """The steps (the first is 1) of the trace of a run that goes on after ``start_step``; empty without one.

    Those asked for, where the run has them all. Else as many, counted from this start, and before its end: the first
    step of a process is left out where there are others, as it sets things up.
    """
    profiling, last = arguments.profiling, arguments.train.train_iters
    if not profiling.use_pytorch_profiler or start_step >= last:
        return range(0)
    asked = range(max(profiling.profile_step_start, 1), profiling.profile_step_end)
    if start_step < asked.start and asked.stop - 1 <= last:
        return asked
    steps = last - start_step
    count = max(min(len(asked), steps - 1), 1)
    first = start_step + min(asked.start, steps - count + 1)
    return range(first, first + count)


def _steps(steps: range) -> str:
    return f"steps {steps.start} to {steps.stop - 1}" if len(steps) > 1 else f"step {steps.start}"


class StepProfiler:
    """Traces this rank's part of the profiled steps: ``begin_step`` and ``end_step`` around the work of each step of
    the run, ``close`` after the last. What comes between two steps, such as a save, is in the trace too."""

    def __init__(self, arguments: BridgeArguments, rank: int, start_step: int, chunks: list, optimizer: Any):
        self.steps = profiled_steps(arguments, start_step)
        self.folder = arguments.save_folder / FOLDER
        self._profiling, self._ranks = arguments.profiling, arguments.profiling.profile_ranks
        mine = self._ranks is None or rank in self._ranks
        # the tools of a GPU's profiler take their time when they start: a step before the trace is given to that
        self._warmup = int(self.steps.start - 1 > start_step + 1)
        self._first = self.steps.start - self._warmup
        self._traced = range(self._first, self.steps.stop) if mine else range(0)
        self._rank, self._trace = rank, self.folder / TRACE.format(rank)
        self._chunks, self._optimizer = chunks, optimizer
        self._last = start_step  # of this part's steps, also on a rank that is not traced
        self._failed = False
        self._profile: Optional[profile] = None
        self._open: list[tuple[str, record_function]] = []

    def moved(self) -> list[str]:
        """A line for the user when the trace is not of the steps that were asked for."""
        asked = range(max(self._profiling.profile_step_start, 1), self._profiling.profile_step_end)
        if not self.steps or self.steps == asked:
            return []
        return [f"profile   {_steps(self.steps)}: this run has not all of {_steps(asked)}"]

    def written(self) -> list[str]:
        """For the user at the end, on any rank: where the traces are, and how to look at them."""
        if not self.steps or self._failed:
            return []
        done = range(self.steps.start, min(self.steps.stop, self._last + 1))
        if not done:
            return [f"profile   none: the run ended before step {self.steps.start}"]
        ranks = "each rank" if self._ranks is None else f"rank {', '.join(map(str, self._ranks))}"
        return [
            f"profile   {_steps(done)} of {ranks}: {self.folder}: open rank_*.json.gz at https://ui.perfetto.dev "
            "or chrome://tracing; rank_*.txt has the operations that took longest"
        ]

    @property
    def running(self) -> bool:
        return self._profile is not None

    def begin_step(self, step: int) -> None:
        # a rollback to before them has the steps traced anew
        self._last = step if step == self._first else max(self._last, step)
        if self._profile is not None:
            if step in self._traced:
                self._profile.step()
            else:
                self.close()
        elif step == self._traced.start and self._traced:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it prints a line when it starts, and one when it stops
            self._profile = profile(
                # a step that is not finite is done again, so no number of steps ends the trace
                schedule=schedule(wait=0, warmup=self._warmup, active=10**6),
                record_shapes=self._profiling.record_shapes,
                activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
            )
            self._profile.start()
        if self._profile is not None:
            listen(self._chunks, self._optimizer, Phases(self._began, self._ended))

    def end_step(self) -> None:
        if self._profile is not None:
            listen(self._chunks, self._optimizer, None)

    def close(self) -> None:
        """Write what was traced, if anything: a run that ends before the last profiled step has those until then."""
        done, self._profile = self._profile, None
        if done is None:
            return
        done.stop()
        if self._last < self.steps.start:
            return
        try:
            self._write(done)
        except (OSError, RuntimeError) as error:  # the trace is not worth the run
            self._failed = True
            print(f"note: no profile of rank {self._rank}: {error}", file=sys.stderr, flush=True)

    def discard(self) -> None:
        """After an error: stop, and write nothing."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, done: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self._trace.name.removesuffix(".json.gz")
        partial = self.folder / f".{name}.partial.json.gz"
        done.export_chrome_trace(str(partial))  # packed, by the name's end
        os.replace(partial, self._trace)
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        rows = done.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        write_text(self.folder / f"{name}.txt", rows + "\n")

    def _began(self, name: str) -> None:
        part = record_function(NAMES.get(name, name))
        part.__enter__()
        self._open.append((name, part))

    def _ended(self, name: str) -> None:
        # the parts lie in one another, the last to begin is the first to end
        begun, part = self._open.pop()
        assert begun == name, (begun, name)
        part.__exit__(None, None, None)
