"""Megatron's DDP, distributed Adam optimizer and learning-rate schedule for a model's chunks."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any, Iterator, Optional

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.utils import get_model_config, unwrap_model
from torch.profiler import record_function

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
        optimizer_cpu_offload=optimizer.optimizer_cpu_offload,
        optimizer_offload_fraction=optimizer.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=optimizer.overlap_cpu_optimizer_d2h_h2d,
        pin_cpu_grads=torch.cuda.is_available(),
    )
    if optimizer.optimizer_cpu_offload:
        # else the master weights stay on the GPU; set here, as its own check fails where there is no Transformer Engine
        config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    result = get_megatron_optimizer(config, chunks)
    get_model_config(chunks[0]).grad_scale_func = result.scale_loss
    return result


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Experts that are shared out over ranks have an optimizer of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm of the whole model's gradients, before clipping; they are then ready for ``update``. Collective.

    A parameter that tensor-parallel ranks hold copies of counts once; where the gradient of a copy that does not count
    is not finite, its rank gets nan.
    """
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    gradients = [
        _gradient(part, parameter)
        for part in parts(optimizer)
        for parameter in part.get_parameters()
        if not param_is_not_tensor_parallel_duplicate(parameter, getattr(part, "tp_group", None))
    ]
    copies = [gradient for gradient in gradients if gradient is not None]
    if copies and not torch.stack(torch._foreach_norm(copies)).isfinite().all():
        return math.nan
    return float(norm)


def _gradient(part: MegatronOptimizer, parameter: torch.Tensor) -> Optional[torch.Tensor]:
    """Where ``prepare_grads`` has put it."""
    decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    return getattr(parameter, "decoupled_grad" if decoupled else "grad", None)


@record_function("optimizer")
@torch.no_grad()
def update(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip the gradients, whose ``gradient_norm`` is given, and step. Collective.

    Megatron's own ``step`` takes the norm and steps in one go, whatever the norm is.
    """
    for part in parts(optimizer):
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                part.config.clip_grad,
                norm,
                part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


class Scheduler(OptimizerParamScheduler):
    """Megatron's, which may go back: its own load_state_dict adds the loaded steps to those it has done."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_steps = 0
        super().load_state_dict(state_dict)


def build_scheduler(optimizer: MegatronOptimizer, arguments: BridgeArguments) -> Scheduler:
    """Linear warm-up from 0, then cosine, linear or no decay to min_lr; counted in optimizer steps."""
    schedule = arguments.scheduler
    decay = schedule.lr_decay_iters or arguments.train.train_iters
    warmup = schedule.lr_warmup_iters
    if schedule.lr_warmup_fraction is not None:
        warmup = int(schedule.lr_warmup_fraction * decay)
    weight_decay = arguments.optimizer.weight_decay
    return Scheduler(
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
