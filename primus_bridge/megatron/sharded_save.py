"""Saving Megatron's torch_dist shards in three steps: plan with all ranks, write alone (in any thread), finish."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.planner import WriteItemType

from primus_bridge.hashing_file import HashingFile, write_hashed
from primus_bridge.megatron.optimizer_shards import optimizer_shards, steps_taken
from primus_bridge.megatron.sharded_state import ModelState, OptimizerState, model_state, sharding_metadata
from primus_bridge.together import gather
from primus_bridge.watchdog import beat_part

BACKEND, VERSION = "torch_dist", 1
COMMON = "common.pt"
COPY_THREADS = 4


class _Items(FileSystemWriterAsync):
    """Keeps what the plan gives this rank to write; megatron.core's own copies it and writes it in child processes."""

    def prepare_local_plan(self, plan):
        return plan  # the folder is there

    def prepare_write_data(self, plan, planner) -> None:
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]
        self.prefix = plan.storage_data.prefix


class ShardedSave:
    """One save of model and optimizer to ``folder``, which is there when it is written. Made by all ranks together.

    check: prove that each part of each tensor is written exactly once, which costs an exchange.
    """

    def __init__(self, folder: Path, model: ModelState, optimizer: Optional[OptimizerState], check: bool):
        self.folder = folder
        state = model_state(model.chunks, model.trainable_only)
        if optimizer is not None:
            state["optimizer"], state["optimizer_tensors"] = optimizer_shards(
                optimizer.optimizer, dict(state), sharding_metadata()
            )
        state["content_metadata"] = sharding_metadata()
        sharded, common = save_preprocess(state, check)
        if optimizer is not None:
            # rank 0's own groups may be empty, and then know no number of steps
            common["optimizer_steps"] = max(gather(steps_taken(state["optimizer"])))
        self.common = io.BytesIO()
        torch.save(common, self.common)  # now: it may hold tensors that a step changes
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.writer = _Items(str(folder), thread_count=1)
        (_, self.metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(tensors, False), self.writer, None, 0, planner=planner
        )
        self.lead = torch.distributed.get_rank() == 0

    @property
    def nbytes(self) -> dict[str, int]:
        """Of this rank's tensors, by component."""
        sizes = {"model": 0, "optimizer": 0}
        for item, data in self.writer.items:
            if item.type != WriteItemType.BYTE_IO:
                sizes["optimizer" if item.index.fqn.startswith("optimizer.") else "model"] += data.nbytes
        return sizes

    def stage(self, buffers: dict[Any, torch.Tensor]) -> None:
        """Copy this rank's tensors to host memory, so that training may change them. buffers: of the save before."""
        old = dict(buffers)
        buffers.clear()
        items, copies = [], []
        for item, data in self.writer.items:
            if item.type != WriteItemType.BYTE_IO:
                key = (item.index.fqn, item.index.offset)
                buffer = old.get(key)
                if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
                    # not pinned: torch rounds pinned blocks up to a power of two, which may be twice the state
                    buffer = torch.empty(data.shape, dtype=data.dtype, device="cpu")
                buffers[key] = buffer
                copies.append((buffer, data.detach()))
                data = buffer
            items.append((item, data))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copying threads have streams of their own
        # one thread does not fill the memory's bandwidth, and torch copies with one
        with ThreadPoolExecutor(COPY_THREADS) as pool:
            list(pool.map(_copy, copies))
        self.writer.items = items

    def write(self, stopped: Callable[[], bool] = lambda: False) -> tuple[list[Any], dict[str, str]]:
        """(what torch's index is made of, checksum of each file written). Asks no other rank; OSError as it comes.

        stopped: asked between tensors; once it is true the rest is not written.
        """
        checksums, results = {}, []
        if self.lead:
            checksums[COMMON] = write_hashed(self.folder / COMMON, self.common.getbuffer())
        if self.writer.items:
            name = f"{self.writer.prefix}0.distcp"
            transforms = _StorageWriterTransforms()
            file: Any = HashingFile(self.folder / name)
            try:
                with _without_crc():
                    for item, data in self.writer.items:
                        if stopped():
                            break
                        beat_part("tensor")
                        if item.type != WriteItemType.BYTE_IO:
                            data = _on_host(data)
                        result = _write_item(transforms, file, data, item, name, SerializationFormat.TORCH_SAVE)
                        results.append(result)
            finally:
                checksums[name] = file.close()
        self.writer.items = []
        return results, checksums

    def finish(self, results: list[list[Any]]) -> None:
        """The index of what all ranks wrote, and Megatron's metadata.json. On rank 0, once all have written."""
        vars(self.metadata).pop("all_local_plans", None)  # every rank's plan again, which nobody reads
        self.writer.finish(self.metadata, results)
        save_config(CheckpointingConfig(BACKEND, VERSION), str(self.folder))


def _copy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    buffer, data = pair
    buffer.copy_(data)


@contextmanager
def _without_crc() -> Iterator[None]:
    """Inside, torch.save leaves out its CRC-32 of each tensor, half of its time: the file has a SHA-256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _on_host(data: torch.Tensor) -> torch.Tensor:
    """In host memory and of its own: torch saves the whole of what a view looks at."""
    data = data.detach().to("cpu")
    whole = data.untyped_storage().nbytes() == data.nbytes
    return data if whole and data.is_contiguous() else data.clone(memory_format=torch.contiguous_format)
