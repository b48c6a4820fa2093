"""The training loop of every method: a batch, a step, what is due (log, evaluate, save), again."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional

import torch
import torch.distributed as dist

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.validate import sequence_multiple
from primus_bridge.data.batches import BatchShape, evaluation_microbatches, microbatches
from primus_bridge.data.loader import Loader
from primus_bridge.data.store import TokenizedDataset
from primus_bridge.megatron.parallel import Parallel, device, peak_memory_bytes
from primus_bridge.megatron.step import Batch, Diverged, Objective, evaluate, train_step
from primus_bridge.together import SharedError


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
    save: Callable[[int, int], Path]
    """Save and commit a checkpoint of the given step and sequences consumed. Collective."""
    start_step: int = 0
    consumed_samples: int = 0
    """Sequences of the steps before."""
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


def _asked(run: TrainingRun, state: RunState) -> _Asked:
    """The same on every rank. Collective."""
    reason = run.interrupted()
    if reason is not None:
        state.request_stop(reason)
    mine = _Asked(reason is not None, state.stop_requested, state.evaluation_requested, state.save_requested)
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
    lead = parallel.rank == 0
    try:
        if lead:
            run.callbacks.on_train_start(state)
        interval, consumed = _Interval(), run.consumed_samples
        while state.step < train.train_iters:
            if lead:
                run.callbacks.on_step_start(state)
            sequences = run.loader.next(train.global_batch_size)
            batch = microbatches(sequences, run.batch_shape)
            try:
                result = train_step(run.chunks, run.optimizer, run.scheduler, batch, run.objective, parallel)
            except Diverged as error:
                raise SharedError(
                    f"training diverged at step {state.step + 1} ({error}); nothing of that step is saved. "
                    "Check the weights and the data, lower lr, or warm up longer"
                ) from None
            state.step += 1
            consumed += train.global_batch_size
            tokens = sum(sequence.data.tokens(sequence.index) for sequence in sequences)
            interval.add(tokens)
            state.tokens += tokens
            last = state.step == train.train_iters
            if lead:
                metrics = {}
                if _due(state.step, arguments.logger.log_interval, last):
                    metrics = {
                        "step": state.step,
                        "loss": result.loss,
                        "grad_norm": result.grad_norm,
                        "lr": result.lr,
                        "supervised_tokens": result.supervised_tokens,
                        "tokens": tokens,
                        **interval.take(),
                        "memory": peak_memory_bytes(),
                    }
                run.callbacks.on_step_end(state, metrics)
            asked = _asked(run, state)
            due = asked.evaluate or _due(state.step, train.eval_interval, last)
            evaluates = run.validation_data is not None and due
            if evaluates and not asked.interrupt:
                asked = _either(asked, _evaluate(run, state))
            saved = checkpoint.save and (asked.save or _due(state.step, checkpoint.save_interval, last or asked.stop))
            if saved:
                path = run.save(state.step, consumed)
                if lead:
                    run.callbacks.on_save(state, path)
            if last and evaluates and asked.interrupt:
                _evaluate(run, state, to_the_end=True)  # no later start of the run would make up for it
            if evaluates or saved:
                interval.restart()
            if asked.stop or (saved and train.exit_after_save):
                break
        run.finish(state)
        if lead:
            run.callbacks.on_train_end(state)
    except BaseException as error:
        if lead:
            run.callbacks.on_error(state, error)
        raise
    return state


def _either(one: _Asked, other: _Asked) -> _Asked:
    return _Asked(*(a or b for a, b in zip(one, other, strict=True)))


def _evaluate(run: TrainingRun, state: RunState, to_the_end: bool = False) -> _Asked:
    """What was asked for meanwhile: by a callback that saw the result, or by a signal, which ends it without one."""
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


class _Interval:
    """Tokens and seconds since the last log line, evaluations and saves left out."""

    def __init__(self):
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self.restart()

    def restart(self) -> None:
        self.since = time.perf_counter()

    def add(self, tokens: int) -> None:
        now = time.perf_counter()
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        self.seconds, self.since = self.seconds + now - self.since, now

    def take(self) -> dict[str, Any]:
        """The rate of tokens (real ones, no padding) and the mean seconds of a step."""
        values = {
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "step_time": self.seconds / max(self.steps, 1),
        }
        self.steps = self.tokens = 0
        self.seconds = 0.0
        return values
