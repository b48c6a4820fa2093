"""Process groups and the device: picked once, asked everywhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import ContextManager, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from primus_bridge.config.arguments import BridgeArguments, DistArguments
from primus_bridge.config.validate import check_ranks
from primus_bridge.conversion.rules import Shard, Shards
from primus_bridge.errors import ConfigError
from primus_bridge.megatron.rng import seed_ranks
from primus_bridge.watchdog import GRACE_SECONDS, watching


def device() -> torch.device:
    """This rank's device: its GPU (CUDA or ROCm), else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def fit_to_device(arguments: BridgeArguments) -> list[str]:
    """Switch off what is for a GPU alone where there is none; lines for the user."""
    optimizer = arguments.optimizer
    if device().type == "cuda" or not optimizer.optimizer_cpu_offload:
        return []
    optimizer.optimizer_cpu_offload = False
    source = arguments.sources.get("optimizer.optimizer_cpu_offload", "default")
    return [f"note: {source}: 'optimizer_cpu_offload' has no effect here: on a CPU all memory is the host's"]


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the layout; sizes and ranks of tensor, pipeline and data parallelism.

    cp: context parallelism; its ranks share a data-parallel rank, so the same batches. ep, etp, edp: expert-parallel,
    and the experts' own tensor and data parallelism.
    """

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vp_size: int
    dp_rank: int
    dp_size: int
    rank: int
    world_size: int
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    edp_rank: int = 0
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def shards(self) -> Shards:
        """Which part of each split tensor this rank holds."""
        return Shards(Shard(self.tp_rank, self.tp_size), Shard(self.etp_rank, self.etp_size))

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def layout(self) -> dict[str, int]:
        """What decides which rank owns which state: sizes, and the kind of device, whose RNG states differ."""
        return {
            "tensor": self.tp_size,
            "pipeline": self.pp_size,
            "virtual": self.vp_size,
            "context": self.cp_size,
            "data": self.dp_size,
            "expert": self.ep_size,
            "expert tensor": self.etp_size,
            "gpu": int(device().type == "cuda"),
        }

    @property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """This rank's process groups; dp_group: with context parallelism; edp_group: the copies of its experts."""
        return {
            "tp_group": self.tp_group,
            "pp_group": parallel_state.get_pipeline_model_parallel_group(),
            "dp_group": self.dp_group,
            "cp_group": parallel_state.get_context_parallel_group(),
            "mp_group": parallel_state.get_model_parallel_group(),
            "ep_group": parallel_state.get_expert_model_parallel_group(),
            "edp_group": parallel_state.get_expert_data_parallel_group(),
        }

    @property
    def tp_group(self):
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def dp_group(self):
        """The ranks whose losses and gradients add up: data-parallel and context-parallel ones."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)


def initialize_distributed(arguments: DistArguments) -> None:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe (one rank without them)."""
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        # a task that Slurm gives one GPU of its own sees only that one, whatever its local rank
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    backend = arguments.distributed_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl" and not torch.cuda.is_available():
        raise ConfigError("distributed_backend nccl needs GPUs, and torch sees none here; see `primus doctor`")
    timeout = timedelta(minutes=arguments.distributed_timeout_minutes, seconds=GRACE_SECONDS)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def initialize(arguments: BridgeArguments) -> Parallel:
    """Join the job (unless joined), make Megatron's groups for this layout over it, and seed its RNG states.

    Raises ConfigError when the number of ranks is not a multiple of the layout.
    """
    initialize_distributed(arguments.dist)
    model = arguments.model
    world = dist.get_world_size()
    check_ranks(arguments, world)
    parallel_state.initialize_model_parallel(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
        distributed_timeout_minutes=arguments.dist.distributed_timeout_minutes + GRACE_SECONDS / 60,
    )
    seed_ranks(arguments.rng.seed)
    return Parallel(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        vp_size=model.virtual_pipeline_model_parallel_size or 1,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        rank=dist.get_rank(),
        world_size=world,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        edp_rank=parallel_state.get_expert_data_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
    )


def watching_ranks(arguments: DistArguments) -> ContextManager[None]:
    """Inside, a rank that hangs is named, and the job ends; see watchdog.py. Collective."""
    waits = ["torch.distributed", "megatron.core", "primus_bridge.together"]
    if device().type == "cuda":
        # there a collective is only queued, and waited for wherever a result is asked for
        waits += ["torch", "primus_bridge.megatron"]
    own_work = ["torch.distributed.checkpoint", "megatron.core.dist_checkpointing"]
    return watching(arguments.distributed_timeout_minutes * 60, waits, own_work)


def destroy_model_parallel() -> None:
    """Forget Megatron's groups and RNG states, so that another layout can follow in the same process."""
    from megatron.core import num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    get_cuda_rng_tracker().reset()
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    destroy_rerun_state_machine()


def leave() -> None:
    """Forget every group without asking the other ranks; nothing when there is none."""
    if dist.is_initialized():
        destroy_model_parallel()
        dist.destroy_process_group()


def finalize() -> None:
    """Leave the job: Megatron's groups, then the process group. Collective."""
    dist.barrier()
    leave()


def gpu_memory_bytes() -> Optional[int]:
    """Memory of this rank's GPU; None on a CPU."""
    return torch.cuda.get_device_properties(device()).total_memory if torch.cuda.is_available() else None


def peak_memory_bytes() -> int:
    """Peak memory of this rank: device memory on a GPU, resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
