"""Where a run starts: a fresh model, a checkpoint's weights or adapter, or the run that a checkpoint continues."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from primus_bridge.checkpoint.manifest import MANIFEST, Checkpoint, Manifest, find, latest
from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments, PeftArguments
from primus_bridge.conversion.model_folder import HFModel, base_name
from primus_bridge.errors import ConfigError
from primus_bridge.peft.plan import describe


@dataclass(frozen=True)
class StartingPoint:
    """model: config and tokenizer; resume: the training state to continue; weights: a checkpoint to take weights from.

    hf_weights: weights come from the model folder. adapter_weights: a checkpoint whose adapter the run starts with;
    adapter: the manifest's record of it when it was trained elsewhere. base_name: what an adapter of this run stands
    on.
    """

    model: HFModel
    resume: Optional[Checkpoint]
    weights: Optional[Checkpoint]
    hf_weights: bool
    adapter_weights: Optional[Checkpoint]
    adapter: Optional[dict[str, Any]]
    base_name: str
    says: str


# what an adapter's weights fit
ADAPTER_FIELDS = ("dim", "alpha", "target_modules", "use_rslora", "use_dora")


def starting_point(arguments: BridgeArguments, fetch_weights: bool = True) -> StartingPoint:
    """Decide by these rules, in order, and say which one held:

    1. SAVE holds a committed checkpoint of this run: continue it (a requeued or restarted job).
    2. ``load`` holds training state of the same stage and peft, and ``finetune`` is off: continue it.
    3. ``load`` holds an adapter, and the run is one of LoRA: the adapter's weights, step 0, over its base.
    4. ``load`` or ``pretrained_checkpoint``: their weights, step 0.
    5. ``convert_from_hf``: the model folder's weights; else (pretraining) seeded random ones.
    Where 1 to 3 find an adapter, what nobody set of ``peft`` follows it: it is filled in place, with its source.
    fetch_weights: False: of a hub id only config.json and the tokenizer.
    Raises ConfigError when a checkpoint is damaged or does not fit.
    """
    checkpoint = arguments.checkpoint
    resume = latest(arguments.save_folder)
    loaded = find(Path(checkpoint.load)) if resume is None and checkpoint.load is not None else None
    _follow_adapter(resume or loaded, arguments)
    if resume is not None and not resume.manifest.training_state and resume.manifest.stage == arguments.stage:
        raise ConfigError(
            f"its checkpoint of step {resume.manifest.step} has no training state (save_optim was false), so this run "
            f"cannot go on: start from its weights, --load {checkpoint.save} with another --save",
            where=str(checkpoint.save),
        )
    if resume is not None and not _same_run(resume, arguments):
        raise ConfigError(
            f"holds checkpoints of another kind of run (stage {resume.manifest.stage}, {_kind(resume)}): "
            "give another --save, or --load it from there",
            where=str(checkpoint.save),
        )
    weights: Optional[Checkpoint] = None
    adapter_weights: Optional[Checkpoint] = None
    says = ""
    if resume is not None:
        says = f"continuing {resume.folder} at step {resume.manifest.step}"
    elif loaded is not None:
        if loaded.manifest.training_state and not checkpoint.finetune and _same_run(loaded, arguments):
            resume, says = loaded, f"continuing {loaded.folder} at step {loaded.manifest.step}"
        elif loaded.manifest.contents == "adapter" and arguments.peft.scheme is not None:
            _check_adapter(loaded, arguments)
            adapter_weights, says = loaded, f"the adapter of {loaded.folder}"
        else:
            weights, says = loaded, f"weights of {loaded.folder}"
    under = checkpoint.pretrained_checkpoint
    if under is None and resume is not None and arguments.peft.scheme is not None:
        under = _base_checkpoint(checkpoint.load)
    if weights is None and under is not None:
        weights = find(Path(under))
        says = says or f"weights of {weights.folder}"
    hf_name = checkpoint.hf_model_name_or_path
    over = resume or adapter_weights
    base = over.manifest.base if over is not None else None
    if over is not None and arguments.peft.scheme is not None and weights is None and not checkpoint.convert_from_hf:
        # the adapter's base, as the checkpoint names it
        if base is not None and (Path(base) / MANIFEST).is_file():
            weights = find(Path(base))
        elif hf_name is None:
            hf_name = base
    if weights is not None and weights.manifest.contents != "model":
        raise ConfigError(
            "holds only a LoRA adapter, not the weights of a model; train it further with --use_lora, or merge it "
            "first: python -m primus.cli.convert --load CKPT --convert_to_hf --merge --hf_save_path OUT",
            where=str(weights.folder),
        )
    over_base = over is not None and arguments.peft.scheme is not None and weights is None
    hf_weights = weights is None and (checkpoint.convert_from_hf or over_base) and (resume is None or over_base)
    model = _model(hf_name, weights or over, hf_weights and fetch_weights)
    if over is not None and weights is not None:
        check_same_model(HFModel.at(over.assets, str(over.folder)), model, over.folder)
    return StartingPoint(
        model=model,
        resume=resume,
        weights=weights,
        hf_weights=hf_weights,
        adapter_weights=adapter_weights,
        adapter=over.manifest.adapter if over is not None else None,
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
    return not _other_fields(found, arguments)


def _other_fields(found: Checkpoint, arguments: BridgeArguments) -> list[str]:
    """ADAPTER_FIELDS in which the run's adapter differs from a checkpoint's."""
    assert found.manifest.peft is not None
    theirs = PeftArguments(**found.manifest.peft)
    return [name for name in ADAPTER_FIELDS if getattr(theirs, name) != getattr(arguments.peft, name)]


def _follow_adapter(found: Optional[Checkpoint], arguments: BridgeArguments) -> None:
    if found is None or found.manifest.peft is None or arguments.peft.scheme is None:
        return
    theirs, usual = PeftArguments(**found.manifest.peft), PeftArguments()
    for name in (*ADAPTER_FIELDS, "dropout"):
        unset = arguments.sources.get(f"peft.{name}", "default") == "default"
        if unset and getattr(arguments.peft, name) == getattr(usual, name):
            schema.put(arguments, f"peft.{name}", getattr(theirs, name), f"{found.folder} (its adapter)")


def _check_adapter(found: Checkpoint, arguments: BridgeArguments) -> None:
    others = _other_fields(found, arguments)
    if others:
        given = ", ".join(f"{name} {schema.shown(getattr(arguments.peft, name))}" for name in others)
        source = arguments.sources.get(f"peft.{others[0]}", "the arguments")
        raise ConfigError(
            f"holds another adapter ({_kind(found)}) than {source} asks for: {given}; leave that out to go on with "
            "this one, or leave load out to start a new one",
            where=str(found.folder),
        )


def _kind(found: Checkpoint) -> str:
    peft = found.manifest.peft
    if peft is None:
        return "all weights"
    return describe(PeftArguments(**peft))


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
    check_same_model(travelling, model, found.folder)
    return model


def check_same_model(travelling: HFModel, model: HFModel, where: Path) -> None:
    """Raises ConfigError when the one found in the folder ``where`` has another architecture than ``model``."""
    mine, theirs = (replace(m.architecture, hf_config={}) for m in (model, travelling))
    if mine != theirs:
        names = [name for name in vars(mine) if getattr(mine, name) != getattr(theirs, name)]
        raise ConfigError(
            f"is another model than {model.name}: {', '.join(names)} differ"
            + "".join(f"; {n} {getattr(theirs, n)} there, {getattr(mine, n)} here" for n in names[:3]),
            where=str(where),
        )


def _base_name(model: HFModel, weights: Optional[Checkpoint]) -> str:
    """A converted checkpoint stands for its Hugging Face model; a trained one for itself."""
    if weights is None:
        return base_name(model.name)
    converted_from = weights.manifest.base if weights.manifest.step == 0 else None
    return converted_from or str(weights.folder.absolute())
