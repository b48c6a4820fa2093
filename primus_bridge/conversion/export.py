"""The model out to a Hugging Face folder: every rank writes its own pieces, and the folder is shown when complete."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family
from primus_bridge.conversion.hf_folder import check_export_folder, check_space, copy_assets
from primus_bridge.conversion.hf_weights import INDEX
from primus_bridge.conversion.rules import Placed, Shards, expected_hf_tensors, placed_rules
from primus_bridge.conversion.safetensors_file import SafetensorsFile
from primus_bridge.errors import ConfigError
from primus_bridge.files import partial_folder, replace_folder, write_json
from primus_bridge.together import writing_together
from primus_bridge.watchdog import beat_part

Tensors = Mapping[str, torch.Tensor]
Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class ExportOptions:
    """assets: files that travel along: tokenizer, chat template, generation config (asset_files).

    dtypes: of tensors that get another dtype than ``dtype``, by their Hugging Face names.
    """

    assets: Sequence[Path]
    dtype: torch.dtype
    max_shard_bytes: int
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def of(self, placed: Placed, name: str) -> torch.dtype:
        return self.dtypes.get(name, torch.float32 if placed.rule.keep_fp32 else self.dtype)


@dataclass(frozen=True)
class _Part:
    """Tensors that a group of ranks writes together, and the files they go to.

    The dense tensors of a pipeline stage are one part, and so are the experts of a stage that lie on the same
    expert-parallel rank. writes: whether this rank is one of the group that writes (others are its replicas);
    lead: whether it makes the files.
    """

    placed: list[Placed]
    files: list[Entries]
    first: int
    """Number of the part's first file among all files."""
    writes: bool
    lead: bool


def _files(placed: Sequence[Placed], arch: Architecture, options: ExportOptions) -> list[Entries]:
    files: list[Entries] = []
    filled = 0
    for one in placed:
        for name, shape in one.hf_tensors(arch).items():
            dtype = options.of(one, name)
            size = dtype.itemsize * int(torch.Size(shape).numel())
            if not files or (files[-1] and filled + size > options.max_shard_bytes):
                files.append({})
                filled = 0
            files[-1][name] = (dtype, shape)
            filled += size
    return files


def _parts(
    parameters: Tensors, family: Family, arch: Architecture, parallel, options: ExportOptions
) -> tuple[list[_Part], int]:
    """(this rank's parts, the number of files of all parts). Collective."""
    held = [placed for placed in placed_rules(family.rules, arch) if placed.megatron in parameters]
    dense = [placed for placed in held if not placed.rule.per_expert]
    experts = [placed for placed in held if placed.rule.per_expert]
    keys = ((0, parallel.pp_rank, 0), (1, parallel.pp_rank, parallel.ep_rank))
    files = [_files(placed, arch, options) for placed in (dense, experts)]
    gathered: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(gathered, [(key, len(own)) for key, own in zip(keys, files, strict=True)])
    counts = dict(pair for pairs in gathered for pair in pairs)
    firsts = [sum(count for other, count in counts.items() if other < key) for key in keys]
    shards = parallel.shards
    parts = [
        _Part(dense, files[0], firsts[0], parallel.dp_rank == 0, parallel.dp_rank == 0 and shards.dense.rank == 0),
        _Part(experts, files[1], firsts[1], parallel.edp_rank == 0, parallel.edp_rank == 0 and shards.expert.rank == 0),
    ]
    return parts, sum(counts.values())


def _config_for(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the dtype of the exported weights, under the spelling that it already uses."""
    name = str(dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    return {**config, key: name}


def export_model(
    parameters: Tensors, family: Family, arch: Architecture, parallel, folder: Path, options: ExportOptions
) -> None:
    """Write config, tokenizer files and safetensors (with an index when several) to ``folder``. Collective.

    parameters: this rank's, by their names in the whole model. Every rank writes the bytes of its own shard into
    files that lie on a disk all ranks see; nothing is gathered. The folder appears when it is complete; an
    interrupted export leaves only a hidden ``.NAME.partial``. Raises ConfigError, the same on every rank, when the
    disk is full.
    """
    prepared = partial_folder(folder)
    parts, total = _parts(parameters, family, arch, parallel, options)
    size = export_bytes(family, arch, options)
    with writing_together("the Hugging Face export", folder, remove=prepared):
        if parallel.rank == 0:
            check_export_folder(folder)
            shutil.rmtree(prepared, ignore_errors=True)
            check_space(folder, size, "the export")
            prepared.mkdir(parents=True)
            copy_assets(options.assets, prepared)
            write_json(prepared / "config.json", _config_for(arch.hf_config, options.dtype))
    weight_map: dict[str, str] = {}
    with writing_together("the Hugging Face export", folder, remove=prepared):
        for part in parts:
            for number, entries in enumerate(part.files, part.first + 1):
                name = _file_name(number, total)
                weight_map.update(dict.fromkeys(entries, name))
                if part.lead:
                    SafetensorsFile.create(prepared / name, entries).close(fsync=False)
    with writing_together("the Hugging Face export", folder, remove=prepared):
        for part in parts:
            if part.writes:
                _write(part, parameters, arch, parallel.shards, prepared, total)
    maps: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(maps, weight_map)
    with writing_together("the Hugging Face export", folder, remove=prepared):
        if parallel.rank == 0:
            whole = {name: file for part in maps for name, file in part.items()}
            assert set(whole) == set(expected_hf_tensors(family.rules, arch)), "a tensor that no rank holds"
            unseen = sorted({file for file in whole.values() if not (prepared / file).is_file()})
            if unseen:
                raise ConfigError(
                    f"{unseen[0]} was written by another node and is not seen here: "
                    "the export folder must lie on a disk that all nodes share",
                    where=str(folder),
                )
            if total > 1:
                index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(whole.items()))}
                write_json(prepared / INDEX, index)
            replace_folder(prepared, folder)


def _write(part: _Part, parameters: Tensors, arch: Architecture, shards: Shards, folder: Path, total: int) -> None:
    """This rank's pieces of ``part`` into its files."""
    with ExitStack() as stack:
        opened: dict[str, SafetensorsFile] = {}
        for number, entries in enumerate(part.files, part.first + 1):
            file = stack.enter_context(SafetensorsFile(folder / _file_name(number, total), entries))
            opened.update(dict.fromkeys(entries, file))
        write_pieces(part.placed, parameters, arch, shards, opened)


def write_pieces(
    placed: Iterable[Placed],
    parameters: Tensors,
    arch: Architecture,
    shards: Shards,
    files: Mapping[str, SafetensorsFile],
    prefix: str = "",
) -> None:
    """What this rank has to write of its parameters.

    files: name of a tensor in its file -> the file, open. prefix: of those names before the rules' own.
    """
    for one in placed:
        beat_part("tensor")
        for piece in one.pieces(parameters[one.megatron].detach(), arch, shards):
            if piece.owned and piece.view.numel():
                name = prefix + piece.name
                files[name].write(name, piece.view, rows=piece.rows, columns=piece.columns)


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def export_bytes(family: Family, arch: Architecture, options: ExportOptions) -> int:
    """Bytes of all exported tensors."""
    return sum(
        options.of(placed, name).itemsize * int(torch.Size(shape).numel())
        for placed in placed_rules(family.rules, arch)
        for name, shape in placed.hf_tensors(arch).items()
    )
