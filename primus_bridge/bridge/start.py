"""Where a run of Megatron-Bridge starts: which of its checkpoints it goes on from, and whose weights it takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from primus_bridge.bridge.fields import refusal
from primus_bridge.checkpoint.manifest import MANIFEST, TRACKER
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.errors import ConfigError

RUN_CONFIG = "run_config.yaml"
_ITERATION = re.compile(r"^iter_(\d{7,})$")


@dataclass(frozen=True)
class Found:
    """The newest checkpoint under ``folder``: its step, whether it holds adapters only, and its Hugging Face model."""

    folder: Path
    step: int
    adapter: bool
    hf_model: Optional[str]


@dataclass(frozen=True)
class Start:
    """load: continued when there is a checkpoint in it; pretrained: weights under the run.

    imports: ``pretrained`` is made of the model folder's weights before the run.
    """

    model: HFModel
    load: Path
    pretrained: Optional[Path]
    imports: bool


def find(folder: Path) -> Optional[Found]:
    """The newest checkpoint that its tracker names; None without one. Raises ConfigError for one that is not its."""
    if any(folder.glob(f"iter_*/{MANIFEST}")) or (folder / MANIFEST).is_file():
        raise ConfigError(
            "holds checkpoints of engine core, which engine bridge cannot read: export one (primus convert --load "
            "CKPT --convert_to_hf --hf_save_path HF) and start from that, or give another folder",
            where=str(folder),
        )
    for state in (*folder.glob("modelopt_state"), *folder.glob("iter_*/modelopt_state")):
        raise ConfigError(
            "is state of ModelOpt, which Megatron-Bridge reads with an unrestricted pickle: whoever made it could run "
            "anything here; nothing was read, and no run needs it: remove it, or give another folder",
            where=str(state),
        )
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    step = int(tracker.read_text())
    config = _run_config(folder / f"iter_{step:07d}" / RUN_CONFIG)
    model = config.get("model") or {}
    return Found(folder, step, config.get("peft") is not None, model.get("hf_model_id"))


def _run_config(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"is no checkpoint of Megatron-Bridge: {RUN_CONFIG}: {error}", where=str(path)) from None


def imported_folder(arguments: BridgeArguments) -> Path:
    """Where the Hugging Face model's weights lie as a checkpoint of Megatron-Bridge."""
    return arguments.save_folder / "pretrained"


def start_of(arguments: BridgeArguments, weights: bool = True) -> Start:
    """Decide by these rules:

    1. SAVE holds a checkpoint: the run goes on from it; else from ``load``, when that holds one of the same kind (all
       weights, or adapters) that was trained, and ``finetune`` is off.
    2. Weights come from ``pretrained_checkpoint``, else from ``load`` where it is not continued, else from the Hugging
       Face model. A continued run needs them only under its adapters.
    weights: False fetches no more than config.json and the tokenizer of a hub id.
    Raises ConfigError when something is missing or is not Megatron-Bridge's.
    """
    checkpoint, save = arguments.checkpoint, arguments.save_folder
    saved = find(save)
    loaded = _must_find(checkpoint.load) if checkpoint.load is not None else None
    adapter = arguments.peft.scheme is not None
    if saved is not None and saved.adapter != adapter:
        raise ConfigError("holds checkpoints of another kind of run: give another --save", where=str(save))
    continued = loaded is not None and loaded.step > 0 and loaded.adapter == adapter and not checkpoint.finetune
    under = _must_find(checkpoint.pretrained_checkpoint) if checkpoint.pretrained_checkpoint is not None else None
    if under is None and loaded is not None and not continued:
        under = loaded
    if under is not None and under.adapter:
        raise ConfigError("holds adapters, not the weights of a model", where=str(under.folder))
    imports = under is None and checkpoint.convert_from_hf
    if adapter and under is None and not imports:
        raise refusal(
            arguments, "peft.scheme", "its adapters need the weights under them: give pretrained_checkpoint too"
        )
    name = checkpoint.hf_model_name_or_path or next(
        (found.hf_model for found in (under, loaded, saved) if found is not None and found.hf_model), None
    )
    if name is None:
        raise ConfigError(
            "engine bridge builds the model from a Hugging Face config.json: give hf_model_name_or_path (without "
            "convert_from_hf when the weights come from a checkpoint)"
        )
    if imports:
        _same_model(imported_folder(arguments), name)
    return Start(
        HFModel.open(name, weights=weights and imports),
        load=loaded.folder if continued and saved is None and loaded is not None else save,
        pretrained=imported_folder(arguments) if imports else under.folder if under is not None else None,
        imports=imports,
    )


def _must_find(path: str) -> Found:
    folder = Path(path)
    match = _ITERATION.match(folder.name)
    found = find(folder.parent if match else folder)
    if found is not None and match and int(match[1]) != found.step:
        raise ConfigError(
            f"is not the newest checkpoint of {folder.parent}, which is that of step {found.step} and which alone "
            "engine bridge starts from",
            where=path,
        )
    if found is None:
        raise ConfigError(
            f"no checkpoint of Megatron-Bridge ({TRACKER} and iter_*/{RUN_CONFIG}); the weights can also come from a "
            "Hugging Face model: --convert_from_hf --hf_model_name_or_path HF",
            where=path,
        )
    return found


def _same_model(folder: Path, name: str) -> None:
    found = find(folder)
    if found is not None and found.hf_model is not None and found.hf_model != str(HFModel.open(name, False).folder):
        raise ConfigError(
            f"holds the weights of {found.hf_model}, and the run is of {name}: give another --save", where=str(folder)
        )
