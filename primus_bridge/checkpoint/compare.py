"""Two checkpoints compared: their manifests, their plain state, and their tensors to the bit, at any two layouts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Optional

from primus_bridge.checkpoint.changes import compared, flat
from primus_bridge.checkpoint.manifest import Checkpoint, Manifest
from primus_bridge.files import file_digest

if TYPE_CHECKING:
    import torch

    from primus_bridge.checkpoint.shards import Shards

MISSING = "-"
PIECE = 2**24
"""Elements that are compared at a time, as doubles."""
LEAVES = 6
"""Of a file of state that are named, when more differ."""
SHARDS = (".metadata", "metadata.json")
"""Besides *.distcp: what lies beside the tensors and follows from the layout."""
HOW_STORED = ("files", "checksums", "checksum", "groups", "components", "arguments", "arguments_digest", "format")
"""Of a manifest: what is compared otherwise, or follows from the rest."""


@dataclass(frozen=True)
class Change:
    """What differs, as people read it: the value in each checkpoint, ``MISSING`` where there is none."""

    name: str
    left: str
    right: str
    how: str = ""


@dataclass(frozen=True)
class Part:
    """One part of two checkpoints: how many things were compared, and those that differ."""

    name: str
    compared: int
    changes: list[Change]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_manifests(left: Manifest, right: Manifest) -> Part:
    """Step, model, layout, versions, components, and the arguments that the numbers of a run depend on."""
    return _part("manifest", _facts(left), _facts(right))


def _facts(manifest: Manifest) -> dict[str, str]:
    values = {name: value for name, value in asdict(manifest).items() if name not in HOW_STORED}
    if manifest.base_digest is not None:
        values.pop("base")  # where it lies says less than what it is
    facts = flat(values) | {f"arguments.{name}": value for name, value in compared(manifest.arguments).items()}
    for component in manifest.components:
        said = [component["pattern"], component["group"], None if component["required"] else "not required"]
        facts[f"component {component['key']}"] = ", ".join(word for word in said if word)
    return {name: str(value) for name, value in facts.items() if value is not None}


def _part(name: str, left: Mapping[str, str], right: Mapping[str, str]) -> Part:
    names = list(dict.fromkeys([*left, *right]))
    changes = [Change(key, left.get(key, MISSING), right.get(key, MISSING)) for key in names]
    return Part(name, len(names), [change for change in changes if change.left != change.right])


def compare_state(left: Checkpoint, right: Checkpoint) -> Part:
    """The state components in files of their own, leaf by leaf, and the model's config and tokenizer."""
    names = list(dict.fromkeys(name for one in (left, right) for name in one.manifest.files if not _is_shard(name)))
    changes = []
    for name in names:
        here, there = (_checksum(one, name) for one in (left, right))
        if here is None or there is None:
            changes.append(Change(name, "there" if here else MISSING, "there" if there else MISSING))
        elif here != there:
            leaves = _leaves(left, right, name) if name.endswith(".pt") else [Change(name, "", "", "other bytes")]
            changes += leaves[:LEAVES]
            if len(leaves) > LEAVES:
                changes.append(Change(name, "", "", f"{len(leaves) - LEAVES} more values differ"))
    return Part("state", len(names), changes)


def _is_shard(name: str) -> bool:
    return name.endswith(".distcp") or name in SHARDS


def _checksum(checkpoint: Checkpoint, name: str) -> Optional[str]:
    if name not in checkpoint.manifest.files:
        return None
    return checkpoint.manifest.checksums.get(name) or file_digest(checkpoint.folder / name)


def _leaves(left: Checkpoint, right: Checkpoint, name: str) -> list[Change]:
    from primus_bridge.checkpoint.safe_load import load_plain

    paths = [one.folder / name for one in (left, right)]
    return _unlike(name, *(load_plain(path, str(path)) for path in paths))


def _unlike(name: str, left: Any, right: Any) -> list[Change]:
    """The leaves of two nested values that differ."""
    from primus_bridge.checkpoint.summaries import name_of, summarise

    here, there = (summarise(name, value, "tensor") for value in (left, right))
    changes = []
    for path in dict.fromkeys([*here, *there]):
        mine, theirs = here.get(path), there.get(path)
        if mine is None or theirs is None:
            changes.append(Change(name_of(path), mine.kind if mine else MISSING, theirs.kind if theirs else MISSING))
        elif mine != theirs:
            how = "other bits" if mine.kind == theirs.kind else ""
            changes.append(Change(name_of(path), mine.kind, theirs.kind, how))
    return changes


def compare_tensors(
    left: Checkpoint, right: Checkpoint, progress: Callable[[int], Any] = lambda count: None
) -> Iterator[Optional[Change]]:
    """Of each tensor and object of the torch_dist shards what differs, None for one that is equal to the bit.

    A part of a tensor is in memory at a time, as one rank of ``left`` saved it, with one of ``right``. progress: told
    of bytes of ``left`` that were read. Raises ConfigError for shards that cannot be read.
    """
    from primus_bridge.checkpoint.shards import Shards

    here, there = Shards(left.folder), Shards(right.folder)
    for name in dict.fromkeys([*here.tensors, *there.tensors]):
        if name in here.tensors and name in there.tensors:
            yield _tensor(here, there, name, progress)
        else:
            yield Change(name, *(one.kind(name) if name in one.tensors else MISSING for one in (here, there)))
    for name in dict.fromkeys([*here.objects, *there.objects]):
        stored = [one.stored(name) if name in one.objects else None for one in (here, there)]
        if None in stored:
            yield Change(name, *(MISSING if data is None else "an object" for data in stored))
        elif stored[0] == stored[1]:
            yield None
        else:
            unlike = _unlike(name, here.load(name), there.load(name))
            if not unlike:
                yield None  # one value may be written in two ways
            yield from unlike


def _tensor(here: Shards, there: Shards, name: str, progress: Callable[[int], Any]) -> Optional[Change]:
    kinds = here.kind(name), there.kind(name)
    if here.tensors[name].shape != there.tensors[name].shape:
        return Change(name, *kinds, "other shapes")
    unlike = seen = 0
    largest = 0.0
    for part in here.parts(name):
        mine = here.load(name, part.offsets)
        progress(mine.numel() * mine.element_size())
        for other in there.parts(name):
            region = part.overlap(other)
            if region is None:
                continue
            theirs = there.load(name, other.offsets)
            counted, by = _differences(region.of(part, mine), region.of(other, theirs))
            unlike, largest = unlike + counted, max(largest, by, key=_or_infinite)
            seen += region.numel
    total = math.prod(here.tensors[name].shape)
    if seen != total:
        return Change(name, *kinds, f"{total - seen:,} of {total:,} elements are not stored in both")
    if not unlike and kinds[0] == kinds[1]:
        return None
    if not unlike:
        return Change(name, *kinds, "equal values")
    return Change(name, *kinds, f"{unlike:,} of {total:,} elements differ, by {largest:.3g} at most")


def _differences(left: torch.Tensor, right: torch.Tensor) -> tuple[int, float]:
    """How many elements of two tensors of one shape differ (of one dtype: in their bits), and the largest difference.

    NaN when a difference is none.
    """
    import torch

    count, largest = 0, 0.0
    for mine, theirs in zip(left.reshape(-1).split(PIECE), right.reshape(-1).split(PIECE), strict=True):
        if mine.dtype == theirs.dtype:
            size = mine.element_size()
            bits = [one.contiguous().view(torch.uint8).view(-1, size) for one in (mine, theirs)]
            if torch.equal(*bits):
                continue
            unlike = (bits[0] != bits[1]).any(dim=1)
        else:
            unlike = mine.double() != theirs.double()
        mine, theirs = mine[unlike].double(), theirs[unlike].double()
        if len(mine):
            count += len(mine)
            largest = max(largest, float((mine - theirs).abs().max()), key=_or_infinite)
    return count, largest


def _or_infinite(number: float) -> float:
    """For max, which would lose a NaN."""
    return math.inf if math.isnan(number) else number


def shard_bytes(manifest: Manifest) -> int:
    """Bytes of the shards, which compare_tensors reads."""
    return sum(size for name, size in manifest.files.items() if name.endswith(".distcp"))
