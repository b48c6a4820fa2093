"""One optimizer step, and one forward-only pass, over a list of micro-batches through Megatron's schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Iterable, Optional

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from primus_bridge.megatron.context_parallel import own_part
from primus_bridge.megatron.documents import Documents, documents_of
from primus_bridge.megatron.optimizer import gradient_norm, update
from primus_bridge.megatron.parallel import Parallel, device
from primus_bridge.watchdog import beat_part

Batch = dict[str, torch.Tensor]
Objective = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the supervised tokens of the whole global batch; equal on every rank. grad_norm: before clipping.

    updated: False when loss or gradient norm is infinite or no number, the same on every rank: weights and optimizer
    are then as before the step.
    """

    loss: float
    supervised_tokens: int
    grad_norm: float
    lr: float
    updated: bool = True


# of a micro-batch, what has a column a position; each context-parallel rank gets its own of them
BY_POSITION = ("tokens", "labels", "position_ids", "loss_mask")


def _own_batch(batch: Batch, parallel: Parallel) -> tuple[Batch, Optional[Documents]]:
    """This rank's positions of a micro-batch, on its device, and the documents of the whole one."""
    own = {
        name: own_part(batch[name], 1, parallel.cp_rank, parallel.cp_size).to(device(), non_blocking=True)
        for name in BY_POSITION
    }
    return own, documents_of(batch)


def _forward_step(objective: Objective, counts: list[torch.Tensor], batches, model) -> tuple[torch.Tensor, Callable]:
    beat_part("forward pass")
    batch, documents = next(batches)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=documents,
    )

    def loss_func(log_probs: torch.Tensor):
        loss, count, metrics = objective(log_probs, batch)
        counts.append(count.detach().float())
        return loss, torch.zeros((), dtype=torch.int, device=count.device), metrics

    return output, loss_func


def _finalize_gradients(counts: list[torch.Tensor], chunks: list, _whole_numbers, **options) -> None:
    """Megatron's reductions, and the division by the sum of the loss weights: it counts in whole numbers only."""
    total = torch.stack(counts).sum() if counts else torch.zeros((), device=device())
    finalize_model_grads(chunks, total, **options)


def run_schedule(
    chunks: list, microbatches: list[Batch], objective: Objective, parallel: Parallel, forward_only: bool
) -> dict[str, tuple[float, float]]:
    """Forward (and backward) of this rank's micro-batches; metrics as (sum, count) over the whole global batch.

    microbatches: tokens, labels, position_ids, loss_mask [b, s], and what documents_of reads; under pipeline
    parallelism all of one shape. Tensor-, pipeline- and context-parallel ranks are given the same; every rank returns
    the same.
    """
    moved = [_own_batch(batch, parallel) for batch in microbatches]
    rows, length = microbatches[0]["tokens"].shape
    iterators = [iter(moved) for _ in chunks]
    counts: list[torch.Tensor] = []
    get_model_config(chunks[0]).finalize_model_grads_func = partial(_finalize_gradients, counts)
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, objective, counts),
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(moved),
        seq_length=length,  # of the whole sequence: Megatron divides it by the context-parallel ranks
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return _reduce(outputs, parallel)


def _reduce(outputs: list[dict[str, torch.Tensor]], parallel: Parallel) -> dict[str, tuple[float, float]]:
    """Sum (sum, count) pairs over micro-batches, data- and context-parallel ranks; the last stage tells the others."""
    names = sorted({name for output in outputs for name in output})
    sums = torch.zeros(len(names) or 1, 2, dtype=torch.float64, device=device())
    for output in outputs:
        for index, name in enumerate(names):
            sums[index] += output[name].double()
    if parallel.dp_size * parallel.cp_size > 1 and parallel.is_last_stage:
        dist.all_reduce(sums, group=parallel.dp_group)
    if parallel.pp_size > 1:
        payload: list[Any] = [(names, sums.tolist())]
        # every rank of the last stage holds the same numbers after the reduction: the job's last rank is one of them
        dist.broadcast_object_list(payload, src=parallel.world_size - 1)
        names, values = payload[0]
    else:
        values = sums.tolist()
    return {name: (values[index][0], values[index][1]) for index, name in enumerate(names)}


def train_step(
    chunks: list, optimizer, scheduler, microbatches: list[Batch], objective: Objective, parallel: Parallel
) -> StepResult:
    """Zero the gradients, run the schedule, step the optimizer and the schedule of the learning rate.

    When loss or gradient norm is not finite on any rank, the optimizer does not step on any.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    metrics = run_schedule(chunks, microbatches, objective, parallel, forward_only=False)
    lr = max(group["lr"] for group in optimizer.param_groups)
    total, count = metrics["loss"]
    loss, grad_norm = total / count, gradient_norm(optimizer)
    finite = _on_every_rank(math.isfinite(loss) and math.isfinite(grad_norm), parallel)
    if finite:
        update(optimizer, grad_norm)
    elif math.isfinite(loss):
        grad_norm = grad_norm if not math.isfinite(grad_norm) else math.nan  # another rank's is not finite
    scheduler.step(increment=1)
    return StepResult(loss, int(metrics["supervised_tokens"][0]), grad_norm, lr, finite)


def _on_every_rank(holds: bool, parallel: Parallel) -> bool:
    if parallel.world_size == 1:
        return holds
    flag = torch.tensor(int(holds), dtype=torch.int, device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


@torch.no_grad()
def evaluate(
    chunks: list, steps: Iterable[list[Batch]], objective: Objective, parallel: Parallel
) -> tuple[Optional[float], int]:
    """(weighted mean over every supervised token of the given micro-batches, the number of those tokens)."""
    for chunk in chunks:
        chunk.eval()
    total = weight = tokens = 0.0
    for microbatches in steps:
        part = run_schedule(chunks, microbatches, objective, parallel, forward_only=True)
        total, weight = total + part["loss"][0], weight + part["loss"][1]
        tokens += part["supervised_tokens"][0]
    for chunk in chunks:
        chunk.train()
    return (total / weight if weight else None), int(tokens)
