"""``primus convert``: a Hugging Face folder into a Megatron checkpoint, and a checkpoint out; no training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import torch

from primus_bridge.checkpoint.base_digest import base_digest, check_base_is_there, other_base
from primus_bridge.checkpoint.integrity import find_whole, removed_meanwhile
from primus_bridge.checkpoint.manifest import MANIFEST, Checkpoint, Manifest, check_save_folder
from primus_bridge.checkpoint.meaning import check_same_model
from primus_bridge.config.arguments import BridgeArguments, PeftArguments
from primus_bridge.conversion.export import ExportOptions, export_bytes, export_model
from primus_bridge.conversion.hf_folder import (
    asset_files,
    check_export_folder,
    check_space,
    dtype_name,
    float_dtype,
    parse_size,
)
from primus_bridge.conversion.load import folder_dtypes, load_weights
from primus_bridge.conversion.model_folder import HFModel, base_name, check_layout
from primus_bridge.errors import ConfigError
from primus_bridge.launch.environment import choose_device
from primus_bridge.together import checking_together

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""The fields of ModelArguments that a conversion takes, by their names."""


def layout_arguments(layout: Optional[dict[str, int]]) -> BridgeArguments:
    """Arguments with the given sizes of LAYOUT; the others are 1."""
    arguments = BridgeArguments()
    for name, size in (layout or {}).items():
        assert name in LAYOUT, name
        setattr(arguments.model, name, size)
    return arguments


def say(line: str) -> None:
    """Print on rank 0."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(line, flush=True)


def import_hf(
    hf_model_name_or_path: str,
    save: str,
    layout: Optional[dict[str, int]] = None,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
) -> Path:
    """Write SAVE/iter_0000000 (weights, config, tokenizer) from a Hugging Face model. Collective.

    layout: sizes of LAYOUT, which decide how many ranks read and write, not what the checkpoint holds. dtype: of the
    stored weights; None: the narrowest that holds each of the folder's tensors, and the export gives back those that
    have another one. Raises ConfigError for whatever is wrong with the model, the layout or the folder.
    """
    choose_device(device)
    folder, arguments = Path(save).expanduser(), layout_arguments(layout)
    with checking_together():
        check_save_folder(folder, "the checkpoint folder")
        model = HFModel.open(hf_model_name_or_path, weights=True)
        arch, family = model.architecture, model.family
        check_layout(arch, arguments.model)
        reader = model.weights()
        params, others = folder_dtypes(reader, family, arch)
        if dtype is not None:
            params, others = float_dtype(dtype), {}
        check_space(folder, export_bytes(family, arch, ExportOptions((), params, 0)), "the checkpoint")

    from primus_bridge.checkpoint.coordinator import Assets
    from primus_bridge.checkpoint.lock import RunLock
    from primus_bridge.checkpoint.weights import save_weights
    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.megatron.model import build_model
    from primus_bridge.megatron.names import global_parameters

    with RunLock.acquire(folder):
        parallel = parallel_module.initialize(arguments)
        chunks = build_model(arch, arguments, parallel, dtype=params)
        load_weights(global_parameters(chunks), reader, family, arch, parallel.shards)
        manifest = Manifest(
            step=0,
            contents="model",
            training_state=False,
            params_dtype=dtype_name(params),
            model_type=arch.model_type,
            layout=parallel.layout,
            base=base_name(hf_model_name_or_path),
            base_digest=base_digest(model),
            hf_dtypes={name: dtype_name(other) for name, other in others.items()},
        )
        path = save_weights(folder, manifest, chunks, Assets(asset_files(model.folder), arch.hf_config))
        for note in model.left_out(reader):
            say(note)
        say(f"converted {hf_model_name_or_path} -> {path} ({manifest.params_dtype})")
    parallel_module.finalize()
    return path


def export_hf(
    load: str,
    hf_save_path: str,
    adapter_only: bool = False,
    merge: bool = False,
    dtype: Optional[str] = None,
    max_shard_size: str = "5GB",
    hf_model_name_or_path: Optional[str] = None,
    layout: Optional[dict[str, int]] = None,
    device: Optional[str] = None,
    verify_checksums: bool = True,
    allow_other_base: bool = False,
) -> Path:
    """Write a Hugging Face folder from a checkpoint of any layout, by ranks of any other one. Collective.

    layout: sizes of LAYOUT: with more ranks each needs less memory. A LoRA checkpoint gives a PEFT folder
    (adapter_only, the default for it) or, with merge, the whole model, of an imported adapter in its base's dtype;
    hf_model_name_or_path names its base where the one in the manifest is not to be had. verify_checksums: read what is
    loaded once more before. allow_other_base: merge into other weights than the adapter was trained over. Raises
    ConfigError.
    """
    choose_device(device)
    target, arguments = Path(hf_save_path).expanduser(), layout_arguments(layout)
    notes: list[str] = []
    with checking_together():
        checkpoint = find_whole(Path(load).expanduser(), verify_checksums)
        manifest = checkpoint.manifest
        max_shard_bytes = parse_size(max_shard_size)
        check_export_folder(target, {"the checkpoint": checkpoint.folder, "the model": hf_model_name_or_path})
        if manifest.contents == "model" and (adapter_only or merge):
            flag = "--adapter_only" if adapter_only else "--merge"
            raise ConfigError(f"{flag}: the checkpoint holds a whole model, no adapter", where=str(checkpoint.folder))
        model = HFModel.at(checkpoint.assets, str(checkpoint.folder))
        check_layout(model.architecture, arguments.model)
        base = hf_model_name_or_path or manifest.base
        if merge and hf_model_name_or_path is None:
            check_base_is_there(base, checkpoint.folder, "--hf_model_name_or_path DIR")
        under = _base_weights(base, model, verify_checksums) if merge else None
        if under is not None and (other := other_base(checkpoint, under.name, under.digest)) is not None:
            if other.certain and not allow_other_base:
                mend = "name the base that it was trained over, or add --allow_other_base"
                raise ConfigError(f"{other.what}; {mend}", where=str(checkpoint.folder))
            notes.append(other.what)
    params = float_dtype(manifest.params_dtype)
    out = float_dtype(dtype) if dtype else params
    others = {} if dtype else {name: float_dtype(other) for name, other in manifest.hf_dtypes.items()}
    if under is not None:
        params = torch.promote_types(params, under.dtype)
        if dtype is None and manifest.step == 0:
            out = under.dtype

    from primus_bridge.conversion.adapters import adapter_config, export_adapter
    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.megatron.model import build_model
    from primus_bridge.megatron.names import global_parameters

    if manifest.contents == "adapter":
        arguments.peft.scheme = "lora"
    parallel = parallel_module.initialize(arguments)
    chunks = build_model(model.architecture, arguments, parallel, dtype=params)
    options = ExportOptions(asset_files(checkpoint.assets), out, max_shard_bytes, others)
    if manifest.contents == "model":
        _load(checkpoint, chunks)
        export_model(global_parameters(chunks), model.family, model.architecture, parallel, target, options)
    else:
        from primus_bridge.peft.build import add_lora
        from primus_bridge.peft.merge import MergedParameters
        from primus_bridge.peft.plan import adapter_plan

        if under is not None:
            under.load(chunks, parallel)
        assert manifest.peft is not None
        lora = PeftArguments(**manifest.peft)
        plan = adapter_plan(lora, model, manifest.adapter)
        add_lora(chunks, lora, plan, seed=None)
        _load(checkpoint, chunks, trainable_only=True)
        if merge:
            merged = MergedParameters(chunks)
            export_model(merged, model.family, model.architecture, parallel, target, options)
        else:
            config = adapter_config(plan, lora.dropout, base, (manifest.adapter or {}).get("config"))
            export_adapter(chunks, plan, parallel, target, options, config)
    for note in notes:
        say(f"note: {note}")
    say(f"exported {checkpoint.folder} -> {target}")
    parallel_module.finalize()
    return target


def _load(checkpoint: Checkpoint, chunks: list, trainable_only: bool = False) -> None:
    """The checkpoint's tensors, of a run that may go on meanwhile."""
    from primus_bridge.megatron.dist_checkpoint import load_sharded

    try:
        load_sharded(checkpoint.folder, chunks, trainable_only=trainable_only)
    except (ConfigError, OSError):
        if (checkpoint.folder / MANIFEST).is_file():
            raise
        raise removed_meanwhile(checkpoint.folder) from None


@dataclass(frozen=True)
class _BaseWeights:
    """The weights under an adapter: what loads them, into model chunks and at a layout; their dtype and digest."""

    name: str
    load: Callable[[list, Any], None]
    dtype: torch.dtype
    digest: Optional[str]


def _base_weights(base: Optional[str], model: HFModel, verify_checksums: bool) -> _BaseWeights:
    """Those of a Hugging Face model or of a Megatron checkpoint.

    model: as it travels with the adapter. Raises ConfigError when the base is another model.
    """

    if base is None:
        raise ConfigError("the adapter's base model is not known: name it with --hf_model_name_or_path")
    if (Path(base) / MANIFEST).is_file():
        found = find_whole(Path(base), verify_checksums)
        check_same_model(HFModel.at(found.assets, str(found.folder)), model, found.folder)

        def load_checkpoint(chunks: list, parallel) -> None:
            from primus_bridge.megatron.dist_checkpoint import load_sharded

            load_sharded(found.folder, chunks)

        return _BaseWeights(
            str(found.folder), load_checkpoint, float_dtype(found.manifest.params_dtype), base_digest(found)
        )
    opened = HFModel.open(base, weights=True)
    check_same_model(opened, model, opened.folder)
    weights = opened.weights()

    def load_folder(chunks: list, parallel) -> None:
        from primus_bridge.megatron.names import global_parameters

        load_weights(global_parameters(chunks), weights, model.family, model.architecture, parallel.shards)

    dtype = folder_dtypes(weights, model.family, model.architecture)[0]
    return _BaseWeights(base, load_folder, dtype, base_digest(opened))
