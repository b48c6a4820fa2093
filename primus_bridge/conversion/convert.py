"""``primus convert``: a Hugging Face folder into a Megatron checkpoint, and a checkpoint out; no training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Optional

from primus_bridge.checkpoint.manifest import Checkpoint, Manifest, find
from primus_bridge.config.arguments import BridgeArguments, PeftArguments
from primus_bridge.conversion.hf_folder import asset_files, check_export_folder, float_dtype, parse_size
from primus_bridge.conversion.model_folder import HFModel, base_name, check_layout
from primus_bridge.errors import ConfigError
from primus_bridge.files import check_writable, existing_parent
from primus_bridge.launch.environment import choose_device


def _arguments(tensor: int = 1, pipeline: int = 1) -> BridgeArguments:
    arguments = BridgeArguments()
    arguments.model.tensor_model_parallel_size = tensor
    arguments.model.pipeline_model_parallel_size = pipeline
    return arguments


def _say(line: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(line, flush=True)


def import_hf(
    hf_model_name_or_path: str,
    save: str,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
) -> Path:
    """Write SAVE/iter_0000000 (weights, config, tokenizer) from a Hugging Face model. Collective.

    dtype: of the stored weights; None: the widest of the folder's tensors, which loses nothing.
    Raises ConfigError for whatever is wrong with the model, the layout or the folder.
    """
    choose_device(device)
    folder = Path(save).expanduser()
    check_writable(folder, "the checkpoint folder")
    model = HFModel.open(hf_model_name_or_path, weights=True)
    arguments = _arguments(tensor_model_parallel_size, pipeline_model_parallel_size)
    check_layout(model.architecture, arguments.model)
    reader = model.weights()
    params = float_dtype(dtype) if dtype else reader.dtype

    from primus_bridge.checkpoint.coordinator import save_run
    from primus_bridge.conversion.load import load_weights
    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.megatron.model import build_model
    from primus_bridge.megatron.names import global_parameters

    parallel = parallel_module.initialize(arguments)
    chunks = build_model(model.architecture, arguments, parallel, dtype=params)
    load_weights(global_parameters(chunks), reader, model.family, model.architecture, parallel.shards)
    manifest = Manifest(
        step=0,
        contents="model",
        training_state=False,
        params_dtype=str(params).removeprefix("torch."),
        model_type=model.architecture.model_type,
        layout=parallel.layout,
        base=base_name(hf_model_name_or_path),
    )
    path = save_run(
        folder,
        manifest,
        chunks,
        None,
        None,
        assets=asset_files(model.folder),
        config=model.architecture.hf_config,
        save_total_limit=None,
    )
    _say(f"converted {hf_model_name_or_path} -> {path} ({manifest.params_dtype})")
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
    device: Optional[str] = None,
) -> Path:
    """Write a Hugging Face folder from a checkpoint of any layout, in one process.

    A LoRA checkpoint gives a PEFT folder (adapter_only, the default for it) or, with merge, the whole model;
    hf_model_name_or_path names its base where the one in the manifest is not to be had. Raises ConfigError.
    """
    choose_device(device)
    checkpoint = find(Path(load).expanduser())
    manifest = checkpoint.manifest
    target = Path(hf_save_path).expanduser()
    max_shard_bytes = parse_size(max_shard_size)
    check_export_folder(target, {"the checkpoint": checkpoint.folder, "the model": hf_model_name_or_path})
    if manifest.contents == "model" and (adapter_only or merge):
        flag = "--adapter_only" if adapter_only else "--merge"
        raise ConfigError(f"{flag}: the checkpoint holds a whole model, no adapter", where=str(checkpoint.folder))
    model = HFModel.at(checkpoint.assets, str(checkpoint.folder))
    params = float_dtype(manifest.params_dtype)
    out = float_dtype(dtype) if dtype else params
    if manifest.contents == "model" or merge:
        _check_space(target, model, out)

    from primus_bridge.conversion.adapters import export_adapter
    from primus_bridge.conversion.export import ExportOptions, export_model
    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.megatron.dist_checkpoint import load_sharded
    from primus_bridge.megatron.model import build_model
    from primus_bridge.megatron.names import global_parameters

    arguments = _arguments()
    if manifest.contents == "adapter":
        arguments.peft.scheme = "lora"
    parallel = parallel_module.initialize(arguments)
    chunks = build_model(model.architecture, arguments, parallel, dtype=params)
    options = ExportOptions(asset_files(checkpoint.assets), out, max_shard_bytes)
    if manifest.contents == "model":
        load_sharded(checkpoint.folder, chunks)
        export_model(global_parameters(chunks), model.family, model.architecture, parallel, target, options)
    else:
        from primus_bridge.peft.lora import add_lora
        from primus_bridge.peft.merge import MergedParameters

        base = hf_model_name_or_path or manifest.base
        if merge:
            _load_base(chunks, base, model)
        assert manifest.peft is not None
        lora = PeftArguments(**manifest.peft)
        add_lora(chunks, lora, model.architecture, seed=0)
        load_sharded(checkpoint.folder, chunks, trainable_only=True)
        if merge:
            merged = MergedParameters(chunks)
            export_model(merged, model.family, model.architecture, parallel, target, options)
        else:
            export_adapter(chunks, lora, model, parallel, target, options, base=base)
    _say(f"exported {checkpoint.folder} -> {target}")
    parallel_module.finalize()
    return target


def _load_base(chunks: list, base: Optional[str], adapter_model: HFModel) -> None:
    """The weights under an adapter: of a Hugging Face model or of a Megatron checkpoint."""
    from primus_bridge.checkpoint.manifest import MANIFEST
    from primus_bridge.conversion.load import load_weights
    from primus_bridge.conversion.rules import Shards
    from primus_bridge.megatron.dist_checkpoint import load_sharded
    from primus_bridge.megatron.names import global_parameters

    if base is None:
        raise ConfigError("the adapter's base model is not known: name it with --hf_model_name_or_path")
    if (Path(base) / MANIFEST).is_file():
        found: Checkpoint = find(Path(base))
        load_sharded(found.folder, chunks)
        return
    model = HFModel.open(base, weights=True)
    load_weights(
        global_parameters(chunks), model.weights(), adapter_model.family, adapter_model.architecture, Shards()
    )


def _check_space(target: Path, model: HFModel, dtype) -> None:
    from primus_bridge.conversion.export import arch_bytes

    needed = arch_bytes(model.family, model.architecture, dtype)
    free = shutil.disk_usage(existing_parent(target)).free
    if free < needed:
        raise ConfigError(
            f"the export needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; give another folder",
            where=str(target),
        )
