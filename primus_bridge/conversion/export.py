"""The model out to a Hugging Face folder: gathered tensor by tensor, written as a stream, shown when complete."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.hf_folder import INDEX, check_export_folder, copy_assets, write_safetensors
from primus_bridge.conversion.rules import Placed, placed_rules
from primus_bridge.files import partial_folder, replace_folder, write_json
from primus_bridge.together import writing_together

Tensors = Mapping[str, torch.Tensor]


def stage_tensors(parameters: Tensors, family: Family, arch: Architecture) -> list[Placed]:
    """The rules whose parameter lies on this pipeline stage, in the model's order."""
    return [placed for placed in placed_rules(family.rules, arch) if placed.megatron in parameters]


def gathered(tensor: torch.Tensor, parallel) -> list[torch.Tensor]:
    """The shards of all tensor-parallel ranks, on rank 0 of the group; an empty list elsewhere. Collective."""
    if parallel.tp_size == 1:
        return [tensor.detach()]
    tensor = tensor.detach().contiguous()
    shards = [torch.empty_like(tensor) for _ in range(parallel.tp_size)] if parallel.tp_rank == 0 else None
    dist.gather(tensor, shards, dst=parallel.tp_source, group=parallel.tp_group)
    return shards or []


def hf_tensors(
    parameters: Tensors, family: Family, arch: Architecture, parallel, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """This stage's Hugging Face tensors, one at a time (collective); nothing on ranks other than tensor-parallel 0."""
    for placed in stage_tensors(parameters, family, arch):
        shards = gathered(parameters[placed.megatron], parallel)
        if shards:
            for template, tensor in placed.rule.export(shards, arch).items():
                yield template.format(layer=placed.layer), tensor.to(dtype)


def _plan(
    parameters: Tensors, family: Family, arch: Architecture, parallel, dtype: torch.dtype, max_shard_bytes: int
) -> tuple[list[dict[str, tuple[torch.dtype, tuple[int, ...]]]], int, int]:
    """(this stage's files as name -> (dtype, shape), number of its first file, number of files). Collective."""
    files: list[dict] = [{}]
    filled = 0
    for placed in stage_tensors(parameters, family, arch):
        for name, shape in placed.hf_tensors(arch).items():
            size = dtype.itemsize * int(torch.Size(shape).numel())
            if files[-1] and filled + size > max_shard_bytes:
                files.append({})
                filled = 0
            files[-1][name] = (dtype, shape)
            filled += size
    counts: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(counts, (parallel.pp_rank, len(files)))
    per_stage = dict(counts)
    first = sum(per_stage[stage] for stage in range(parallel.pp_rank))
    return files, first, sum(per_stage.values())


def _config_for(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the dtype of the exported weights, under the spelling that it already uses."""
    name = str(dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: name}


@dataclass(frozen=True)
class ExportOptions:
    """assets: files that travel along: tokenizer, chat template, generation config (asset_files)."""

    assets: Sequence[Path]
    dtype: torch.dtype
    max_shard_bytes: int


def export_model(
    parameters: Tensors, family: Family, arch: Architecture, parallel, folder: Path, options: ExportOptions
) -> None:
    """Write config, tokenizer files and safetensors (with an index when several) to ``folder``. Collective.

    parameters: this rank's, by their names in the whole model. Memory: one tensor per tensor-parallel group. The
    folder appears when it is complete; an interrupted export leaves only a hidden ``.NAME.partial``. Raises
    ConfigError, the same on every rank, when the disk is full.
    """
    prepared, dtype = partial_folder(folder), options.dtype
    files, first, total_files = _plan(parameters, family, arch, parallel, dtype, options.max_shard_bytes)
    size = arch_bytes(family, arch, dtype)
    with writing_together("the Hugging Face export", folder, remove=prepared):
        if parallel.rank == 0:
            check_export_folder(folder)
            shutil.rmtree(prepared, ignore_errors=True)
            prepared.mkdir(parents=True)
            copy_assets(options.assets, prepared)
            write_json(prepared / "config.json", _config_for(arch.hf_config, dtype))
    weight_map: dict[str, str] = {}
    with writing_together("the Hugging Face export", folder, remove=prepared):
        if parallel.dp_rank == 0:
            stream = hf_tensors(parameters, family, arch, parallel, dtype)
            try:
                if parallel.tp_rank == 0:
                    for offset, entries in enumerate(files):
                        name = _file_name(first + offset + 1, total_files)
                        write_safetensors(prepared / name, entries, (next(stream) for _ in range(len(entries))))
                        weight_map.update(dict.fromkeys(entries, name))
            finally:
                # the gathers go on: the other tensor-parallel ranks write nothing, and this one may have failed to
                for _ in stream:
                    pass
    maps: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(maps, weight_map)
    with writing_together("the Hugging Face export", folder, remove=prepared):
        if parallel.rank == 0:
            if total_files > 1:
                whole = {name: file for part in maps for name, file in part.items()}
                write_json(
                    prepared / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(whole.items()))}
                )
            replace_folder(prepared, folder)


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def arch_bytes(family: Family, arch: Architecture, dtype: torch.dtype) -> int:
    """Bytes of all exported tensors."""
    shapes = (shape for placed in placed_rules(family.rules, arch) for shape in placed.hf_tensors(arch).values())
    return dtype.itemsize * sum(int(torch.Size(shape).numel()) for shape in shapes)
