"""Where a run starts: a fresh model, a checkpoint's weights, or the run that a checkpoint continues."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from primus_bridge.checkpoint.manifest import MANIFEST, Checkpoint, Manifest, find, latest
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.model_folder import HFModel, base_name
from primus_bridge.errors import ConfigError


@dataclass(frozen=True)
class StartingPoint:
    """model: config and tokenizer; resume: the training state to continue; weights: a checkpoint to take weights from.

    hf_weights: weights come from the model folder. base_name: what an adapter of this run stands on.
    """

    model: HFModel
    resume: Optional[Checkpoint]
    weights: Optional[Checkpoint]
    hf_weights: bool
    base_name: str
    says: str


def starting_point(arguments: BridgeArguments) -> StartingPoint:
    """Decide by these rules, in order, and say which one held:

    1. SAVE holds a committed checkpoint of this run: continue it (a requeued or restarted job).
    2. ``load`` holds training state of the same stage and peft, and ``finetune`` is off: continue it.
    3. ``load`` or ``pretrained_checkpoint``: their weights, step 0.
    4. ``convert_from_hf``: the model folder's weights; else (pretraining) seeded random ones.
    Raises ConfigError when a checkpoint is damaged or does not fit.
    """
    checkpoint = arguments.checkpoint
    resume = latest(arguments.save_folder)
    if resume is not None and not _same_run(resume, arguments):
        raise ConfigError(
            f"holds checkpoints of another kind of run (stage {resume.manifest.stage}, {_kind(resume)}): "
            "give another --save, or --load it from there",
            where=str(checkpoint.save),
        )
    weights: Optional[Checkpoint] = None
    says = ""
    if resume is not None:
        says = f"continuing {resume.folder} at step {resume.manifest.step}"
    elif checkpoint.load is not None:
        loaded = find(Path(checkpoint.load))
        if loaded.manifest.training_state and not checkpoint.finetune and _same_run(loaded, arguments):
            resume, says = loaded, f"continuing {loaded.folder} at step {loaded.manifest.step}"
        else:
            weights, says = loaded, f"weights of {loaded.folder}"
    under = checkpoint.pretrained_checkpoint
    if under is None and resume is not None and arguments.peft.scheme is not None:
        under = _base_checkpoint(checkpoint.load)
    if weights is None and under is not None:
        weights = find(Path(under))
        says = says or f"weights of {weights.folder}"
    hf_name = checkpoint.hf_model_name_or_path
    base = resume.manifest.base if resume is not None else None
    if resume is not None and arguments.peft.scheme is not None and weights is None and not checkpoint.convert_from_hf:
        # the adapter's base, as the checkpoint names it
        if base is not None and (Path(base) / MANIFEST).is_file():
            weights = find(Path(base))
        elif hf_name is None:
            hf_name = base
    if weights is not None and weights.manifest.contents != "model":
        raise ConfigError(
            "holds only a LoRA adapter, not the weights of a model; merge it first: "
            "python -m primus.cli.convert --load CKPT --convert_to_hf --merge --hf_save_path OUT",
            where=str(weights.folder),
        )
    over_base = resume is not None and arguments.peft.scheme is not None and weights is None
    hf_weights = weights is None and (checkpoint.convert_from_hf or over_base) and (resume is None or over_base)
    model = _model(hf_name, weights or resume, hf_weights)
    return StartingPoint(
        model=model,
        resume=resume,
        weights=weights,
        hf_weights=hf_weights,
        base_name=base or _base_name(model, weights),
        says=says or ("its weights" if hf_weights else "random weights"),
    )


def _base_checkpoint(load: Optional[str]) -> Optional[str]:
    """``load`` of a resumed LoRA run when it is the base under the adapter, not the adapter's own checkpoint."""
    return load if load is not None and find(Path(load)).manifest.contents == "model" else None


def _same_run(found: Checkpoint, arguments: BridgeArguments) -> bool:
    manifest = found.manifest
    if not manifest.training_state or manifest.stage != arguments.stage:
        return False
    peft = arguments.peft
    if manifest.peft is None or peft.scheme is None:
        return (manifest.peft is None) == (peft.scheme is None)
    return all(manifest.peft[name] == getattr(peft, name) for name in ("dim", "alpha", "target_modules"))


def _kind(found: Checkpoint) -> str:
    peft = found.manifest.peft
    if peft is None:
        return "all weights"
    return f"LoRA rank {peft['dim']}, alpha {peft['alpha']:g} on {', '.join(peft['target_modules'])}"


def changed_arguments(manifest: Manifest, arguments: BridgeArguments) -> list[str]:
    """A line for each argument that a resumed run has otherwise than the run that saved the checkpoint."""
    lines = []
    for section in ("model", "train", "optimizer", "scheduler", "dataset", "peft", "rng"):
        before = manifest.arguments.get(section, {})
        for name, value in vars(getattr(arguments, section)).items():
            if name in before and before[name] != value:
                lines.append(f"changed   {section}.{name}: {before[name]} in the checkpoint, {value} now")
    return lines


def _model(hf_name: Optional[str], found: Optional[Checkpoint], hf_weights: bool) -> HFModel:
    """The named model, else the one whose config and tokenizer travel with the checkpoint; both must agree."""
    if found is None:
        assert hf_name is not None
        return HFModel.open(hf_name, hf_weights)
    travelling = HFModel.at(found.assets, str(found.folder))
    if hf_name is None:
        return travelling
    model = HFModel.open(hf_name, hf_weights)
    mine, theirs = (replace(m.architecture, hf_config={}) for m in (model, travelling))
    if mine != theirs:
        names = [name for name in vars(mine) if getattr(mine, name) != getattr(theirs, name)]
        raise ConfigError(
            f"is another model than {hf_name}: {', '.join(names)} differ"
            + "".join(f"; {n} {getattr(theirs, n)} there, {getattr(mine, n)} here" for n in names[:3]),
            where=str(found.folder),
        )
    return model


def _base_name(model: HFModel, weights: Optional[Checkpoint]) -> str:
    """A converted checkpoint stands for its Hugging Face model; a trained one for itself."""
    if weights is None:
        return base_name(model.name)
    converted_from = weights.manifest.base if weights.manifest.step == 0 else None
    return converted_from or str(weights.folder.absolute())
