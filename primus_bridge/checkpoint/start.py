"""Where a run starts: a fresh model, a checkpoint's weights or adapter, or the run that a checkpoint continues."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Mapping, Optional

from primus_bridge.checkpoint.base_digest import base_digest, check_base_is_there, other_base
from primus_bridge.checkpoint.manifest import (
    MANIFEST,
    OLD_FORMAT,
    Checkpoint,
    candidates,
    committed,
    open_checkpoint,
)
from primus_bridge.checkpoint.meaning import (
    ADAPTER_FIELDS,
    FORCE,
    check_same_model,
    kind,
    other_fields,
    other_kind,
    tokenizer_changes,
)
from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments, PeftArguments
from primus_bridge.conversion.model_folder import HFModel, base_name
from primus_bridge.errors import ConfigError

Damage = Mapping[Path, ConfigError]
"""Checkpoint folders that were found damaged, and what is to be said of each."""


@dataclass(frozen=True)
class StartingPoint:
    """model: config and tokenizer; resume: the training state to continue; weights: a checkpoint to take weights from.

    hf_weights: weights come from the model folder. adapter_weights: a checkpoint whose adapter the run starts with;
    adapter: the manifest's record of it when it was trained elsewhere. base_name: what an adapter of this run stands
    on. forced, changed: lines on what differs from the run that saved; notes: what else is to be said. passed_over:
    damaged checkpoints that are newer than the one that is loaded.
    """

    model: HFModel
    resume: Optional[Checkpoint]
    weights: Optional[Checkpoint]
    hf_weights: bool
    adapter_weights: Optional[Checkpoint]
    adapter: Optional[dict[str, Any]]
    base_name: str
    says: str
    forced: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    passed_over: Damage = field(default_factory=dict)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those that are read."""
        return [one for one in (self.resume, self.weights, self.adapter_weights) if one is not None]

    @cached_property
    def base_digest(self) -> Optional[str]:
        """Of the weights that an adapter of this run stands on; they are looked at when it is first asked for.

        None where they are random, or of a checkpoint without checksums.
        """
        if self.weights is not None:
            return base_digest(self.weights)
        return base_digest(self.model) if self.hf_weights else None

    def check_base(self, force: bool) -> None:
        """Whether the adapter that the run goes on with was trained over the weights that are under it now.

        Raises ConfigError when it was over others, unless forced.
        """
        adapter = self.resume or self.adapter_weights
        if adapter is None or adapter.manifest.contents != "adapter":
            return
        name = str(self.weights.folder) if self.weights is not None else self.model.name
        other = other_base(adapter, name, self.base_digest)
        if other is None:
            return
        if other.certain and not force:
            raise ConfigError(
                f"{other.what}; name the base that it was trained over, {FORCE}", where=str(adapter.folder)
            )
        (self.forced if other.certain else self.notes).append(other.what)


def starting_point(
    arguments: BridgeArguments, fetch_weights: bool = True, damaged: Damage | None = None
) -> StartingPoint:
    """Decide by these rules, in order, and say which one held:

    1. SAVE holds a committed checkpoint of this run: continue it (a requeued or restarted job).
    2. ``load`` holds training state of the same stage and peft, and ``finetune`` is off: continue it.
    3. ``load`` holds an adapter, and the run is one of LoRA: the adapter's weights, step 0, over its base.
    4. ``load`` or ``pretrained_checkpoint``: their weights, step 0.
    5. ``convert_from_hf``: the model folder's weights; else (pretraining) seeded random ones.
    Where 1 to 3 find an adapter, what nobody set of ``peft`` follows it: it is filled in place, with its source.
    A continued run must mean the same: stage, adapter, model and vocabulary; ``force_resume`` lets differ what the
    checkpoint's tensors still fit.
    fetch_weights: False: of a hub id only config.json and the tokenizer. damaged: folders that were found damaged;
    of a save folder the newest one that is whole counts, by its sizes.
    Raises ConfigError when no checkpoint is whole or one does not fit.
    """
    checkpoint, force = arguments.checkpoint, arguments.checkpoint.force_resume
    places = _Places(damaged or {}, {})
    resume = places.saved(arguments.save_folder)
    loaded = places.find(checkpoint.load) if resume is None and checkpoint.load is not None else None
    _follow_adapter(resume or loaded, arguments)
    forced: list[str] = []
    changed: list[str] = []
    notes: list[str] = []
    weights: Optional[Checkpoint] = None
    adapter_weights: Optional[Checkpoint] = None
    says = ""
    if resume is not None:
        _check_continues(resume, arguments)
        forced += _check_kind(resume, arguments)
        says = f"continuing {resume.folder} at step {resume.manifest.step}"
        if checkpoint.finetune:
            source = arguments.sources.get("checkpoint.finetune", "default")
            notes.append(
                f"{source}: 'finetune' has no effect here: {checkpoint.save} holds checkpoints of this run, which goes "
                "on; to start a new one give another --save"
            )
    elif loaded is not None:
        other = other_kind(loaded, arguments)
        same = not other.what or (other.fits and force)
        if _has_run(loaded) and not checkpoint.finetune and same:
            forced += other.what
            resume, says = loaded, f"continuing {loaded.folder} at step {loaded.manifest.step}"
        elif loaded.manifest.contents == "adapter" and arguments.peft.scheme is not None:
            forced += _check_adapter(loaded, arguments)
            adapter_weights, says = loaded, f"the adapter of {loaded.folder}"
        else:
            weights, says = loaded, f"weights of {loaded.folder}"
        if resume is None and loaded.manifest.format == OLD_FORMAT and loaded.manifest.training_state:
            says += " (of an older version, whose runs cannot be continued)"
    if resume is not None:
        _check_optimizer(resume, arguments)
    under = checkpoint.pretrained_checkpoint
    if under is None and resume is not None and arguments.peft.scheme is not None and checkpoint.load is not None:
        # the base under the adapter, where load is not the adapter's own checkpoint
        under = checkpoint.load if places.find(checkpoint.load).manifest.contents == "model" else None
    if weights is None and under is not None:
        weights = places.find(under)
        says = says or f"weights of {weights.folder}"
    hf_name = checkpoint.hf_model_name_or_path
    over = resume or adapter_weights
    adapted = over is not None and arguments.peft.scheme is not None
    base = over.manifest.base if over is not None else None
    if over is not None and adapted and weights is None and not checkpoint.convert_from_hf:
        # the adapter's base, as the checkpoint names it
        if base is not None and (Path(base) / MANIFEST).is_file():
            weights = places.find(base)
        elif hf_name is None:
            mend = "--pretrained_checkpoint CKPT, or --hf_model_name_or_path DIR --convert_from_hf"
            check_base_is_there(base, over.folder, mend)
            hf_name = base
    if weights is not None and weights.manifest.contents != "model":
        raise ConfigError(
            "holds only a LoRA adapter, not the weights of a model; train it further with --use_lora, or merge it "
            "first: python -m primus.cli.convert --load CKPT --convert_to_hf --merge --hf_save_path OUT",
            where=str(weights.folder),
        )
    over_base = adapted and weights is None
    hf_weights = weights is None and (checkpoint.convert_from_hf or over_base) and (resume is None or over_base)
    model, numbers = _model(hf_name, weights or over, hf_weights and fetch_weights, force)
    forced += numbers
    if over is not None and weights is not None:
        forced += check_same_model(HFModel.at(over.assets, str(over.folder)), model, over.folder, force)
    if resume is not None:
        tokenizer = arguments.tokenizer.tokenizer_model or str(model.folder)
        vocabulary, others = tokenizer_changes(resume.assets, tokenizer)
        forced += _check_vocabulary(resume, vocabulary, tokenizer, force)
        changed += [f"{name}: that of {tokenizer} differs from the checkpoint's" for name in others]
    says = says or ("its weights" if hf_weights else "random weights")
    start = StartingPoint(
        model=model,
        resume=resume,
        weights=weights,
        hf_weights=hf_weights,
        adapter_weights=adapter_weights,
        adapter=over.manifest.adapter if over is not None else None,
        base_name=base if base and not (force and adapted) else _base_name(model, weights),
        says=says
        + "".join(f" ({name.name} is damaged: {_reason(error)})" for name, error in places.passed_over.items()),
        forced=list(dict.fromkeys(forced)),
        changed=changed,
        notes=notes,
        passed_over=places.passed_over,
    )
    if fetch_weights:
        start.check_base(force)
    return start


@dataclass(frozen=True)
class _Places:
    """Finds checkpoints that are whole; ``passed_over`` gets the damaged ones that are newer."""

    damaged: Damage
    passed_over: dict[Path, ConfigError]

    def saved(self, save: Path) -> Optional[Checkpoint]:
        """The newest whole checkpoint of a save folder, None where there is none. Raises when all are damaged."""
        return self.find(str(save)) if save.is_dir() and committed(save) else None

    def find(self, place: str) -> Checkpoint:
        """The checkpoint of an iteration folder, or the newest whole one of a save folder. Raises without one."""
        passed: dict[Path, ConfigError] = {}
        for folder in candidates(Path(place)):
            try:
                if folder in self.damaged:
                    raise self.damaged[folder]
                found = open_checkpoint(folder)
            except ConfigError as error:
                if folder == Path(place):
                    raise
                passed[folder] = error
            else:
                self.passed_over.update(passed)
                return found
        listed = "; ".join(f"{folder.name}: {_reason(error)}" for folder, error in passed.items())
        raise ConfigError(
            f"every checkpoint in it is damaged ({listed}); bring one back, or give another folder", where=place
        )


def _reason(error: ConfigError) -> str:
    return error.message.removeprefix("damaged checkpoint: ")


def _has_run(found: Checkpoint) -> bool:
    return found.manifest.training_state and found.manifest.format != OLD_FORMAT


def _check_continues(resume: Checkpoint, arguments: BridgeArguments) -> None:
    if _has_run(resume) or (not resume.manifest.training_state and resume.manifest.stage != arguments.stage):
        return
    why = "has no training state (save_optim was false)"
    if resume.manifest.training_state:
        why = "was written by an older version"
    save = arguments.checkpoint.save
    raise ConfigError(
        f"its checkpoint of step {resume.manifest.step} {why}, so this run cannot go on: start from its weights, "
        f"--load {save} with another --save",
        where=str(save),
    )


def _check_kind(resume: Checkpoint, arguments: BridgeArguments) -> list[str]:
    """What was forced. Raises ConfigError for a run of another kind."""
    other = other_kind(resume, arguments)
    fits = other.fits and _has_run(resume)
    if other.what and not (fits and arguments.checkpoint.force_resume):
        raise ConfigError(
            f"holds checkpoints of another kind of run (stage {resume.manifest.stage}, {kind(resume)}): "
            f"give another --save, or --load it from there{f', {FORCE}' if fits else ''}",
            where=str(arguments.checkpoint.save),
        )
    return other.what


def _check_optimizer(resume: Checkpoint, arguments: BridgeArguments) -> None:
    """Raises ConfigError when the optimizer's state was saved by the other of Megatron's two optimizers."""
    now = arguments.ddp.use_distributed_optimizer
    saved = (one["pattern"] == "per_rank" for one in resume.manifest.components if one["key"] == "optimizer")
    before = next(saved, now)
    if before == now:
        return
    name = "ddp.use_distributed_optimizer"
    raise ConfigError(
        f"was saved with {name} {schema.shown(before)}, this run has {schema.shown(now)} "
        f"({arguments.sources.get(name, 'default')}), which cannot read its optimizer's state; set it to "
        f"{schema.shown(before)}, or start from its weights: --load {resume.folder} --finetune, with another --save",
        where=str(resume.folder),
    )


def _check_adapter(found: Checkpoint, arguments: BridgeArguments) -> list[str]:
    """What was forced. Raises ConfigError for another adapter than the one that the run asks for."""
    others = other_fields(found.manifest, arguments)
    if not others:
        return []
    other = other_kind(found, arguments)
    if other.fits and arguments.checkpoint.force_resume:
        return [line for line in other.what if line.startswith("peft.")]
    given = ", ".join(f"{name} {schema.shown(getattr(arguments.peft, name))}" for name in others)
    source = arguments.sources.get(f"peft.{others[0]}", "the arguments")
    raise ConfigError(
        f"holds another adapter ({kind(found)}) than {source} asks for: {given}; leave that out to go on with "
        f"this one, or leave load out to start a new one{f', {FORCE}' if other.fits else ''}",
        where=str(found.folder),
    )


def _check_vocabulary(resume: Checkpoint, vocabulary: Optional[str], tokenizer: str, force: bool) -> list[str]:
    """What was forced. Raises ConfigError for another vocabulary."""
    if vocabulary is None:
        return []
    if not force:
        raise ConfigError(
            f"was trained with another vocabulary than that of {tokenizer}: {vocabulary}; name the tokenizer that it "
            f"was trained with, {FORCE}",
            where=str(resume.folder),
        )
    return [f"the vocabulary, that of {tokenizer}: {vocabulary}"]


def _follow_adapter(found: Optional[Checkpoint], arguments: BridgeArguments) -> None:
    if found is None or found.manifest.peft is None or arguments.peft.scheme is None:
        return
    theirs, usual = PeftArguments(**found.manifest.peft), PeftArguments()
    for name in (*ADAPTER_FIELDS, "dropout"):
        unset = arguments.sources.get(f"peft.{name}", "default") == "default"
        if unset and getattr(arguments.peft, name) == getattr(usual, name):
            schema.put(arguments, f"peft.{name}", getattr(theirs, name), f"{found.folder} (its adapter)")


def _model(
    hf_name: Optional[str], found: Optional[Checkpoint], hf_weights: bool, force: bool
) -> tuple[HFModel, list[str]]:
    """The named model, else the one whose config and tokenizer travel with the checkpoint; both must agree.

    The second: in what they were forced to.
    """
    if found is None:
        assert hf_name is not None
        return HFModel.open(hf_name, hf_weights), []
    travelling = HFModel.at(found.assets, str(found.folder))
    if hf_name is None:
        return travelling, []
    model = HFModel.open(hf_name, hf_weights)
    return model, check_same_model(travelling, model, found.folder, force)


def _base_name(model: HFModel, weights: Optional[Checkpoint]) -> str:
    """A converted checkpoint stands for its Hugging Face model; a trained one for itself."""
    if weights is None:
        return base_name(model.name)
    converted_from = weights.manifest.base if weights.manifest.step == 0 else None
    return converted_from or str(weights.folder.absolute())
