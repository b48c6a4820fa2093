"""Whether a checkpoint means the same to the run that goes on with it: the kind of run, the model, the vocabulary."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Optional

from primus_bridge.checkpoint.changes import changed, flat
from primus_bridge.checkpoint.manifest import Checkpoint, Manifest
from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments, PeftArguments
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.errors import ConfigError
from primus_bridge.peft.plan import describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# what an adapter's weights fit
ADAPTER_FIELDS = ("dim", "alpha", "target_modules", "use_rslora", "use_dora")
# of those, the ones by which an adapter of the same tensors is only scaled
SCALE_FIELDS = ("alpha", "use_rslora")

NUMBERS = (
    "layernorm_epsilon",
    "rope",
    "local_rope",
    "zero_centered_norm",
    "activation",
    "windows",
    "softmax_scale",
    "attention_softcap",
    "logit_softcap",
    "clip_qkv",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_divisor",
    "moe.top_k",
    "moe.score",
    "moe.normalise",
    "moe.scaling",
    "moe.groups",
    "moe.top_groups",
    "moe.group_scores",
    "init_std",
)
"""Parts of an Architecture that no tensor's shape depends on."""

FORCE = "or go on all the same with --force_resume"


@dataclass(frozen=True)
class OtherKind:
    """What makes a run another one than a checkpoint's. fits: whether the checkpoint's tensors fit it all the same."""

    what: list[str]
    fits: bool


def other_kind(found: Checkpoint, arguments: BridgeArguments) -> OtherKind:
    """Differences of stage and adapter, each with both values and the source of the run's."""
    manifest, peft = found.manifest, arguments.peft
    what, fits = [], True
    if manifest.stage != arguments.stage:
        what.append(_line("stage", manifest.stage, arguments.stage, arguments))
    if (manifest.peft is None) != (peft.scheme is None):
        before = None if manifest.peft is None else manifest.peft["scheme"]
        return OtherKind([*what, _line("peft.scheme", before, peft.scheme, arguments)], fits=False)
    for name in other_fields(manifest, arguments):
        assert manifest.peft is not None
        what.append(_line(f"peft.{name}", manifest.peft[name], getattr(peft, name), arguments))
        # an adapter that was trained elsewhere has an alpha of its own for each module
        fits = fits and name in SCALE_FIELDS and not (name == "alpha" and manifest.adapter is not None)
    return OtherKind(what, fits)


def other_fields(manifest: Manifest, arguments: BridgeArguments) -> list[str]:
    """ADAPTER_FIELDS in which the run's adapter differs from a checkpoint's."""
    if manifest.peft is None or arguments.peft.scheme is None:
        return []
    theirs = PeftArguments(**manifest.peft)
    return [name for name in ADAPTER_FIELDS if getattr(theirs, name) != getattr(arguments.peft, name)]


def kind(found: Checkpoint) -> str:
    """The weights that a checkpoint trains, in words."""
    peft = found.manifest.peft
    return "all weights" if peft is None else describe(PeftArguments(**peft))


def _line(name: str, before: Any, now: Any, arguments: BridgeArguments) -> str:
    return changed(name, schema.shown(before), schema.shown(now), arguments)


def check_same_model(travelling: HFModel, model: HFModel, where: Path, force: Optional[bool] = None) -> list[str]:
    """Raises ConfigError when the one found in the folder ``where`` has another architecture than ``model``.

    force: whether numbers that no shape depends on may differ; None: they may not, and nothing could force it. Returns
    what was forced.
    """
    theirs, mine = _numbers(travelling), _numbers(model)
    names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    rotary = travelling.architecture.rope is not None and model.architecture.rope is not None
    shapes = [name for name in names if not _is_number(name) and not (rotary and name == "max_position_embeddings")]
    if not names:
        return []
    what = [f"{n} {schema.shown(theirs.get(n))} there, {schema.shown(mine.get(n))} here" for n in shapes or names]
    if force and not shapes:
        return [f"{line} ({model.name})" for line in what]
    mend = ""
    if force is not None:
        mend = "; the weights fit no other shape" if shapes else f"; name the model that it was trained as, {FORCE}"
    raise ConfigError(f"is another model than {model.name}: {'; '.join(what[:3])}{mend}", where=str(where))


def _numbers(model: HFModel) -> dict[str, Any]:
    values = asdict(model.architecture)
    del values["hf_config"]
    return flat(values)


def _is_number(name: str) -> bool:
    # without its parts it says that positions are learned
    return name != "rope" and any(name == one or name.startswith(f"{one}.") for one in NUMBERS)


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What maps ids to text and back: the tokenizer's model (vocabulary, merges), the added tokens by id, and which
    tokens begin, end and stand for the unknown."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "model": backend["model"],
        "added": {token["id"]: [token["content"], token["special"]] for token in backend["added_tokens"]},
        "roles": {role: getattr(tokenizer, role) for role in ("bos_token", "eos_token", "unk_token")},
    }


def vocabulary_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of ``vocabulary``, in hexadecimal digits; the chat template is no part of it."""
    return hashlib.sha256(json.dumps(vocabulary(tokenizer), sort_keys=True).encode()).hexdigest()


def tokenizer_changes(before: Path, now: str | Path) -> tuple[Optional[str], list[str]]:
    """Compare the tokenizers of two places: (how the vocabularies differ or None, other parts that do).

    before: a checkpoint's; now: the run's folder or hub id. Raises ConfigError where there is none.
    """
    from primus_bridge.data.tokenizer import load_tokenizer

    if _same_files(before, Path(now)):
        return None, []
    theirs, mine = load_tokenizer(str(before)), load_tokenizer(str(now))
    others = []
    if theirs.chat_template != mine.chat_template:
        others.append("the chat template")
    steps = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (theirs, mine)]
    others += [
        f"the tokenizer's {name.replace('_', '-')}"
        for name in ("normalizer", "pre_tokenizer", "post_processor")
        if steps[0][name] != steps[1][name]
    ]
    if vocabulary_digest(theirs) == vocabulary_digest(mine):
        return None, others
    return _how(theirs, mine), others


def _same_files(before: Path, now: Path) -> bool:
    """Whether the tokenizers' files are the same, byte for byte."""
    from primus_bridge.conversion.hf_folder import GENERATION_CONFIG, asset_files

    files = [{path.name: path for path in asset_files(folder)} for folder in (before, now)]
    for found in files:
        found.pop(GENERATION_CONFIG, None)
    return (
        bool(files[0])
        and set(files[0]) == set(files[1])
        and all(path.read_bytes() == files[1][name].read_bytes() for name, path in files[0].items())
    )


def _how(theirs: PreTrainedTokenizerFast, mine: PreTrainedTokenizerFast) -> str:
    """The first tokens whose ids are others, else what else is."""
    before, now = theirs.get_vocab(), mine.get_vocab()
    names = sorted({token for token, _ in before.items() ^ now.items()}, key=lambda token: _place(token, before, now))
    if names:
        first = "; ".join(
            f"{token!r} is {_id(before, token)} in the checkpoint, {_id(now, token)} now" for token in names[:3]
        )
        return f"{len(names):,} tokens differ: {first}"
    roles = [
        f"{role} is {schema.shown(old)} in the checkpoint, {schema.shown(new)} now"
        for (role, old), new in zip(
            vocabulary(theirs)["roles"].items(), vocabulary(mine)["roles"].values(), strict=True
        )
        if old != new
    ]
    return "; ".join(roles) or "its merges or special tokens differ"


def _place(token: str, before: Mapping[str, int], now: Mapping[str, int]) -> tuple[int, str]:
    return min(ids[token] for ids in (before, now) if token in ids), token


def _id(ids: Mapping[str, int], token: str) -> str:
    return f"id {ids[token]}" if token in ids else "unknown"
