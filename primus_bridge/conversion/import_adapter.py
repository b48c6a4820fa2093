"""A PEFT adapter into a Megatron checkpoint of adapters, at any layout; its base is looked at, not loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Optional

from primus_bridge.checkpoint.base_digest import base_digest
from primus_bridge.checkpoint.manifest import Manifest, check_save_folder
from primus_bridge.conversion.convert import layout_arguments, say
from primus_bridge.conversion.hf_folder import asset_files, dtype_name, float_dtype, is_folder
from primus_bridge.conversion.model_folder import HFModel, base_name, check_layout
from primus_bridge.conversion.peft_folder import PeftFolder
from primus_bridge.errors import ConfigError
from primus_bridge.launch.environment import choose_device
from primus_bridge.together import checking_together


def import_adapter(
    adapter: str,
    hf_model_name_or_path: str,
    save: str,
    layout: Optional[dict[str, int]] = None,
    dtype: Optional[str] = None,
    device: Optional[str] = None,
    allow_other_base: bool = False,
) -> Path:
    """Write SAVE/iter_0000000 (adapter weights, config, tokenizer) from a PEFT folder and the model under it.

    Collective. layout: sizes of convert.LAYOUT. dtype: of the stored weights; None: as they are. The tokenizer is the
    adapter's own where its folder has one. Raises ConfigError for whatever is wrong with adapter, model or layout.
    """
    choose_device(device)
    folder, arguments = Path(save).expanduser(), layout_arguments(layout)
    with checking_together():
        check_save_folder(folder, "the checkpoint folder")
        found = PeftFolder.open(adapter)
        model = HFModel.open(hf_model_name_or_path, weights=False)
        plan = found.plan(model, allow_other_base)
        check_layout(model.architecture, arguments.model)
        digest = _digest(model)

    from primus_bridge.checkpoint.coordinator import Assets
    from primus_bridge.checkpoint.lock import RunLock
    from primus_bridge.checkpoint.weights import save_weights
    from primus_bridge.conversion.adapters import load_adapter
    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.megatron.model import build_model
    from primus_bridge.peft.build import add_lora

    arguments.peft = found.arguments(plan)
    params = float_dtype(dtype) if dtype else found.dtype
    with RunLock.acquire(folder):
        parallel = parallel_module.initialize(arguments)
        chunks = build_model(model.architecture, arguments, parallel, dtype=params)
        add_lora(chunks, arguments.peft, plan, seed=None)
        load_adapter(chunks, plan, found, parallel)
        manifest = Manifest(
            step=0,
            contents="adapter",
            training_state=False,
            params_dtype=dtype_name(params),
            model_type=model.architecture.model_type,
            layout=parallel.layout,
            base=base_name(hf_model_name_or_path),
            base_digest=digest,
            peft=asdict(arguments.peft),
            adapter=found.record(plan),
            hf_dtypes={} if dtype else found.other_dtypes,
        )
        tokenizer = found.folder if any(found.folder.glob("tokenizer*")) else None
        path = save_weights(
            folder, manifest, chunks, Assets(asset_files(model.folder, tokenizer), model.architecture.hf_config)
        )
        for note in found.config.notes:
            say(f"note: {note}")
        say(f"converted {adapter} on {hf_model_name_or_path} -> {path} ({manifest.params_dtype})")
    parallel_module.finalize()
    return path


def _digest(model: HFModel) -> Optional[str]:
    """Of the base's weights; None where they are not here: of a hub id they are not fetched.

    Raises ConfigError for a folder of the user's whose weights are damaged.
    """
    if not any(path for pattern in ("*.safetensors*", "pytorch_model*.bin*") for path in model.folder.glob(pattern)):
        return None
    try:
        return base_digest(model)
    except ConfigError:
        if is_folder(model.name):
            raise
        return None  # in the hub's cache some files of a model may be there without the others
