"""Process groups and the device: picked once, asked everywhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import ContextManager, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.rendezvous import rendezvous

from primus_bridge.config.arguments import BridgeArguments, DistArguments
from primus_bridge.config.validate import check_ranks
from primus_bridge.conversion.rules import Shard, Shards
from primus_bridge.errors import ConfigError
from primus_bridge.megatron.rng import seed_ranks
from primus_bridge.watchdog import GRACE_SECONDS, watching

OWN_WORK = ["torch.distributed.checkpoint", "megatron.core.dist_checkpointing"]
"""Packages inside those of ``waits_on`` in whose functions a rank works by itself."""


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


# the store of the job that this process is in: its address, rank and size; connection, rank, size; times joined
_store: dict[tuple[Optional[str], ...], tuple[dist.Store, int, int, int]] = {}


def _job_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(the job's store, this rank, how many there are), of the environment.

    A process that joins again, as a program that trains twice, keeps its connection and takes another prefix: a rank
    that connects anew may still find the store that rank 0 is about to close, and then waits for ever.
    """
    job = tuple(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    if job not in _store:
        _store.clear()
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        _store[job] = (store, rank, world_size, 0)
    store, rank, world_size, times = _store[job]
    _store[job] = (store, rank, world_size, times + 1)
    return dist.PrefixStore(f"joined {times}", store), rank, world_size


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
        store, rank, world_size = _job_store(timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
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
    return watching(arguments.distributed_timeout_minutes * 60, waits_on(device().type), OWN_WORK)


def waits_on(kind: str) -> list[str]:
    """Packages in whose functions a rank waits for others, on that kind of device."""
    waits = ["torch.distributed", "megatron.core", "primus_bridge.together"]
    if kind == "cuda":
        # there a collective is only queued, and waited for wherever a result is asked for
        waits += ["torch", "primus_bridge.megatron", "primus_bridge.checkpoint.replication"]
    return waits


def wait_for_queued() -> None:
    """Until this rank's GPU has done what it was given, collectives too; a CPU has.

    Before work that asks for results elsewhere than in the packages of ``waits_on``.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
        if dist.get_world_size() == 1:
            _store.clear()  # nobody else is about to come back to it
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
