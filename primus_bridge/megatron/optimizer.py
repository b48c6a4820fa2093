"""Megatron's DDP, distributed Adam optimizer and learning-rate schedule for a model's chunks."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config, unwrap_model

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.megatron.model import GPTModel, params_dtype


def wrap_data_parallel(chunks: list[GPTModel], arguments: BridgeArguments) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk: gradient buffers (fp32 by default) and their reduction."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=arguments.ddp.grad_reduce_in_fp32,
        overlap_grad_reduce=arguments.ddp.overlap_grad_reduce,
        use_distributed_optimizer=arguments.ddp.use_distributed_optimizer,
    )
    wrapped = [
        # as Megatron-LM: only the first chunk's buckets are split, the others' communication overlaps anyway
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config = get_model_config(chunks[0])
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def unwrapped(chunks: list[DistributedDataParallel]) -> list[GPTModel]:
    """The chunks without their DDP."""
    return unwrap_model(chunks)


def release(chunks: list) -> None:
    """Undo what would keep chunks and optimizer alive for ever once nobody holds them.

    The optimizer's slices of the parameters hold autograd's nodes of those, the nodes hold DDP's hooks, the hooks the
    chunk, and the chunk's config the optimizer: a cycle through autograd, which Python's collector does not see.
    """
    for chunk in chunks:
        chunk.grad_accs.clear()
        config = get_model_config(chunk)
        config.grad_scale_func = config.no_sync_func = config.finalize_model_grads_func = None


def build_optimizer(chunks: list[DistributedDataParallel], arguments: BridgeArguments) -> MegatronOptimizer:
    """Adam with decoupled weight decay; biases and one-dimensional parameters are not decayed, as in Megatron."""
    optimizer = arguments.optimizer
    dtype = params_dtype(arguments)
    config = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=arguments.ddp.use_distributed_optimizer,
    )
    result = get_megatron_optimizer(config, chunks)
    get_model_config(chunks[0]).grad_scale_func = result.scale_loss
    return result


def build_scheduler(optimizer: MegatronOptimizer, arguments: BridgeArguments) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then cosine, linear or no decay to min_lr; counted in optimizer steps."""
    schedule = arguments.scheduler
    decay = schedule.lr_decay_iters or arguments.train.train_iters
    warmup = schedule.lr_warmup_iters
    if schedule.lr_warmup_fraction is not None:
        warmup = int(schedule.lr_warmup_fraction * decay)
    weight_decay = arguments.optimizer.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=arguments.optimizer.lr,
        min_lr=arguments.optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        # a resumed run follows its own arguments, not those of the checkpoint
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


# what a checkpoint's parameter groups would bring along, against the arguments of the run that resumes it
HYPERPARAMETERS = ("max_lr", "min_lr", "betas", "eps")


@contextmanager
def keep_hyperparameters(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, a checkpoint may be loaded; afterwards the groups have the hyperparameters they had before."""
    before = [{name: group[name] for name in HYPERPARAMETERS if name in group} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, before, strict=True):
        group.update(values)
