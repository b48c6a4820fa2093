"""The training loop of every method: a batch, a step, what is due (log, evaluate, save), again."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Protocol

import torch
import torch.distributed as dist
from torch.profiler import record_function

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.validate import sequence_multiple
from primus_bridge.data.batches import BatchShape, evaluation_microbatches, microbatches
from primus_bridge.data.loader import Loader
from primus_bridge.data.store import TokenizedDataset
from primus_bridge.megatron.measure import Measurements
from primus_bridge.megatron.parallel import Parallel, device
from primus_bridge.megatron.step import Batch, Objective, StepResult, evaluate, train_step
from primus_bridge.nonfinite import NonFinite, settle
from primus_bridge.together import SharedError, from_rank_0
from primus_bridge.watchdog import beat


class Checkpoints(Protocol):
    """What the loop asks of a run's checkpoints; each is collective but ``writing``."""

    @property
    def pending(self) -> bool:
        """Whether one has begun and is not committed; the same on every rank."""
        ...

    @property
    def writing(self) -> bool:
        """Whether this rank still writes it."""
        ...

    def begin(self, step: int, consumed_samples: int, must: bool) -> None:
        """Take the state of ``step``. must: a failure ends the run, else only one too many does."""
        ...

    def finish(self, must: bool) -> Optional[Path]:
        """Wait for it and commit it; None when it failed."""
        ...


@dataclass
class TrainingRun:
    """What the loop needs: the model's parts, the data, the objective, and who to tell."""

    arguments: BridgeArguments
    parallel: Parallel
    chunks: list
    optimizer: Any
    scheduler: Any
    loader: Loader
    """The training sequences, at the place where the run goes on."""
    validation_data: Optional[TokenizedDataset]
    objective: Objective
    batch_shape: BatchShape
    callbacks: Callback
    checkpoints: Checkpoints
    measured: Measurements
    note_memory: Callable[[int], None]
    """Write down every rank's memory as of a step. Collective."""
    start_step: int = 0
    consumed_samples: int = 0
    """Sequences of the steps before."""
    nonfinite: NonFinite = field(default_factory=NonFinite)
    """The steps before whose loss or gradient was not finite."""
    rollback: Callable[[], Optional[int]] = lambda: None
    """Load the newest checkpoint again, all but its place in the data; its step, None without one. Collective."""
    interrupted: Callable[[], Optional[str]] = lambda: None
    """Why the run should save and end, once this rank has been told to; else None."""
    finish: Callable[[RunState], None] = lambda state: None
    """What is done with the model before callbacks hear that the run has ended. Collective."""

    def evaluation_batches(self) -> Iterator[list[Batch]]:
        train = self.arguments.train
        assert self.validation_data is not None
        limit = train.eval_iters * train.global_batch_size if train.eval_iters else None
        per_call = train.global_batch_size // (train.micro_batch_size * self.parallel.dp_size)
        shape = replace(self.batch_shape, noise_seed=None)
        return evaluation_microbatches(self.validation_data, shape, max_sequences=limit, num_microbatches=per_call)


def batch_shape(arguments: BridgeArguments, parallel: Parallel, pad_id: int) -> BatchShape:
    """How this layout wants its micro-batches cut."""
    model, train = arguments.model, arguments.train
    return BatchShape(
        micro_batch_size=train.micro_batch_size,
        dp_rank=parallel.dp_rank,
        dp_size=parallel.dp_size,
        pad_id=pad_id,
        seq_length=model.seq_length,
        pad_to=arguments.dataset.pad_to,
        same_length=parallel.pp_size > 1,
        multiple_of=sequence_multiple(model),
        noise_seed=arguments.rng.seed if train.neftune_noise_alpha else None,
    )


def _due(step: int, interval: Optional[int], last: bool) -> bool:
    return last or bool(interval and step % interval == 0)


class _Asked(NamedTuple):
    """What was asked for after a step, on any rank: rank 0's callbacks ask, and a signal may reach one rank alone."""

    interrupt: bool
    stop: bool
    evaluate: bool
    save: bool
    writing: bool
    """Whether a rank still writes the checkpoint that is pending."""


def _asked(run: TrainingRun, state: RunState) -> _Asked:
    """The same on every rank. Collective."""
    reason = run.interrupted()
    if reason is not None:
        state.request_stop(reason)
    mine = _Asked(
        reason is not None,
        state.stop_requested,
        state.evaluation_requested,
        state.save_requested,
        run.checkpoints.writing,
    )
    state.evaluation_requested = state.save_requested = False
    asked = mine
    if run.parallel.world_size > 1:
        flags = torch.tensor(mine, dtype=torch.int, device=device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        asked = _Asked(*map(bool, flags.tolist()))
    if asked.stop:
        state.request_stop("another rank was told to end")
    state.interrupted = state.interrupted or asked.interrupt
    return asked


def _ended_before(run: TrainingRun, state: RunState) -> bool:
    """Whether a callback asked at on_train_start for the end; rank 0's, so that no rank begins a step. Collective."""
    reason = from_rank_0(lambda: state.stop_reason or "")
    if reason:
        state.request_stop(reason)
    return bool(reason)


def run_loop(run: TrainingRun) -> RunState:
    """Train from run.start_step to train_iters; returns the state at the end. Collective."""
    arguments, parallel = run.arguments, run.parallel
    train, checkpoint = arguments.train, arguments.checkpoint
    state = RunState(
        arguments,
        run.start_step,
        train.train_iters,
        parallel.world_size,
        has_validation=run.validation_data is not None,
    )
    run.nonfinite.show(state)
    lead = parallel.rank == 0
    interval, consumed = _Interval(), run.consumed_samples
    try:
        if lead:
            run.callbacks.on_train_start(state)
        ended = _ended_before(run, state)
        interval.restart()
        while not ended and state.step < train.train_iters:
            beat(f"step {state.step + 1}")
            if lead:
                run.callbacks.on_step_start(state)
            with record_function("data"):
                sequences = run.loader.next(train.global_batch_size)
                batch = microbatches(sequences, run.batch_shape)
            with run.measured.step(state.step + 1, batch):
                result = train_step(run.chunks, run.optimizer, run.scheduler, batch, run.objective, parallel)
            consumed += train.global_batch_size
            if result.updated:
                run.nonfinite.in_a_row = 0
            else:
                if run.checkpoints.pending and train.on_nonfinite == "rollback":
                    _commit(run, state, must=False)  # it may be the newest
                if settle(run, state, result):
                    interval = _Interval()
                    continue
            state.step += 1
            tokens = sum(sequence.data.tokens(sequence.index) for sequence in sequences)
            interval.add(state.step, result, tokens)
            state.tokens += tokens
            last = state.step == train.train_iters
            if lead:
                logs = _due(state.step, arguments.logger.log_interval, last)
                run.callbacks.on_step_end(state, _metrics(run, state, interval) if logs else {})
            if state.step == run.start_step + 1:
                run.note_memory(state.step)
            asked = _asked(run, state)
            due = asked.evaluate or _due(state.step, train.eval_interval, last)
            evaluates = run.validation_data is not None and due
            if evaluates and not asked.interrupt:
                asked = _either(asked, _evaluate(run, state))
            if run.checkpoints.pending and not asked.writing:
                _commit(run, state, must=False)
            saved = checkpoint.save and (asked.save or _due(state.step, checkpoint.save_interval, last or asked.stop))
            if saved:
                ends = last or asked.stop or train.exit_after_save
                _save(run, state, consumed, ends)
            if last and evaluates and asked.interrupt:
                _evaluate(run, state, to_the_end=True)  # no later start of the run would make up for it
            if evaluates or saved:
                interval.restart()
            if asked.stop or (saved and train.exit_after_save):
                break
        run.measured.profiler.close()
        if state.step > run.start_step:
            run.note_memory(state.step)
        beat("the end of training")
        run.finish(state)
        if lead:
            state.unlogged = _metrics(run, state, interval)
            run.callbacks.on_train_end(state)
    except BaseException as error:
        run.measured.profiler.discard()
        if isinstance(error, SharedError) and run.checkpoints.pending:  # all ranks are here: it is not lost
            with suppress(SharedError):
                _commit(run, state, must=False)
        if lead:
            with suppress(Exception):  # of what is broken; the error under way is the one to report
                state.unlogged = _metrics(run, state, interval)
            run.callbacks.on_error(state, error)
        raise
    return state


@record_function("save")
def _save(run: TrainingRun, state: RunState, consumed: int, ends: bool) -> None:
    """Begin a checkpoint; wait for it when the run ends with it, or when saves are not asynchronous."""
    if run.checkpoints.pending:  # one at a time
        _commit(run, state, must=False)
    beat(f"the save after step {state.step}")
    run.checkpoints.begin(state.step, consumed, must=ends)
    if run.checkpoints.pending and (ends or not run.arguments.checkpoint.async_save):
        _commit(run, state, must=ends)


@record_function("commit")
def _commit(run: TrainingRun, state: RunState, must: bool) -> None:
    beat(f"the commit of a checkpoint after step {state.step}")
    path = run.checkpoints.finish(must)
    if path is not None and run.parallel.rank == 0:
        run.callbacks.on_save(state, path)


def _either(one: _Asked, other: _Asked) -> _Asked:
    return _Asked(*(a or b for a, b in zip(one, other, strict=True)))


@record_function("evaluate")
def _evaluate(run: TrainingRun, state: RunState, to_the_end: bool = False) -> _Asked:
    """What was asked for meanwhile: by a callback that saw the result, or by a signal, which ends it without one."""
    beat(f"the evaluation after step {state.step}")
    batches = run.evaluation_batches() if to_the_end else _until_interrupted(run, state)
    loss, count = evaluate(run.chunks, batches, run.objective, run.parallel)
    if run.parallel.rank == 0 and (to_the_end or not state.interrupted):
        run.callbacks.on_eval_end(state, {"step": state.step, "eval_loss": loss, "eval_supervised_tokens": count})
    return _asked(run, state)


def _until_interrupted(run: TrainingRun, state: RunState) -> Iterator[list[Batch]]:
    """The evaluation's batches, the same number on every rank; a signal does not wait for the rest of them."""
    for batch in run.evaluation_batches():
        if _asked(run, state).interrupt:
            return
        yield batch


def _metrics(run: TrainingRun, state: RunState, interval: _Interval) -> dict[str, Any]:
    """A log line of the last step, and of those since the line before; {} when there are none. On rank 0."""
    result = interval.result
    if result is None or interval.step != state.step:  # the second: an error amid a rollback
        return {}
    return {
        "step": state.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "supervised_tokens": result.supervised_tokens,
        "tokens": interval.last_tokens,
        **interval.take(),
        "memory": run.measured.memory.peak(),
        **run.measured.memory.phases().metrics(),
        **_counts(state),
    }


def _counts(state: RunState) -> dict[str, int]:
    """Of what most runs have none."""
    counts = {"nonfinite_steps": state.nonfinite_steps, "rollbacks": state.rollbacks}
    return {name: count for name, count in counts.items() if count}


class _Interval:
    """Steps since the last log line: their tokens and seconds, evaluations and saves left out, and the last of them."""

    def __init__(self) -> None:
        self._clear()
        self.restart()

    def _clear(self) -> None:
        self.steps = self.tokens = self.step = self.last_tokens = 0
        self.seconds = 0.0
        self.result: Optional[StepResult] = None

    def restart(self) -> None:
        self.since = time.perf_counter()

    def add(self, step: int, result: StepResult, tokens: int) -> None:
        now = time.perf_counter()
        self.step, self.result, self.last_tokens = step, result, tokens
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        self.seconds, self.since = self.seconds + now - self.since, now

    def take(self) -> dict[str, Any]:
        """The rate of tokens (real ones, no padding) and the mean seconds of a step."""
        values = {
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "step_time": self.seconds / max(self.steps, 1),
        }
        self._clear()
        return values
