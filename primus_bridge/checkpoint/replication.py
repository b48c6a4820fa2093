"""Replication checks: whether state that ranks should hold alike is alike, and on every rank what differs where.

The levels, by what is looked at in each component's state:
  none    nothing.
  quick   names, types, shapes, dtypes and plain values; of each tensor the sum of its bytes as 8-byte integers, taken
          on its device: one changed bit is seen, words that changed places are not.
  tensor  the SHA-256 of each tensor's bytes instead of the sum.
  full    the bytes themselves, beside those of another rank; what differs is counted and measured.
Numbers are compared by their bits: a NaN equals the same NaN, and -0.0 is not 0.0.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from primus_bridge.checkpoint.components import LEVELS
from primus_bridge.checkpoint.summaries import CHUNK, LeafPath, Summary, bytes_of, leaves, name_of, summarise, words
from primus_bridge.together import SharedError, gather

SHOWN = 8
"""Leaves, ranks and verdicts that a message names; it gives the number of the others."""


@dataclass(frozen=True)
class Replica:
    """One component's state on this rank, which every rank of ``group`` should hold the same.

    state: nested mappings, lists and tuples of tensors, numpy arrays, numbers, strings, bytes, None, dtypes, sizes, and
    sets of plain values. group: None: the world. level: one of LEVELS.
    """

    key: str
    state: Any
    group: Optional[ProcessGroup]
    level: str


class Claim(NamedTuple):
    """What a rank says of a component in one line. group: the lowest rank of its group."""

    key: str
    level: str
    group: int
    digest: bytes
    unknown: list[tuple[LeafPath, str]]


class Split(NamedTuple):
    """Ranks of a group that hold the same, but not what most of the group, the ``agreeing``, do.

    component: its index. group: the group's lowest rank.
    """

    component: int
    group: int
    agreeing: list[int]
    odd: list[int]


class Difference(NamedTuple):
    """Between two tensors: elements with other bits, of how many, and the largest difference (NaN with a NaN)."""

    elements: int
    total: int
    largest: float


def check_replicas(replicas: Sequence[Replica]) -> None:
    """Compare each component with the other ranks of its group. Collective over the world.

    Every rank gives the same keys in the same order, and the groups of one key partition the world.
    Raises SharedError, the same on every rank, naming components, ranks and leaves, when ranks of a group differ or
    state on any rank holds what cannot be compared. The ranks said to differ are those that do not hold what most of
    their group do; where no content has most, what the lowest of those ranks holds counts as right.
    """
    replicas = [replica for replica in replicas if replica.level != "none"]
    if not replicas:
        return
    # at full the bytes are compared after it: only ranks whose structure agrees can go through them together
    summaries = [
        summarise(replica.key, replica.state, "none" if replica.level == "full" else replica.level)
        for replica in replicas
    ]
    splits = _splits(gather(_claims(replicas, summaries)))
    if not splits and _bytes_differ(replicas):
        summaries = [summarise(replica.key, replica.state, "tensor") for replica in replicas]
        splits = _splits(gather(_claims(replicas, summaries)))
        assert splits, "bytes that differ have the same SHA-256"
        differences = _measure(replicas, splits)
    else:
        differences = {}
    if splits:
        raise SharedError(_explain(replicas, summaries, splits, differences))


# --- the bytes of two ranks side by side


def _bytes_differ(replicas: Sequence[Replica]) -> bool:
    """Whether any rank's tensors, of the components at level full, differ from those of its group's lowest rank.

    Collective, over the groups and then the world.
    """
    replicas = [replica for replica in replicas if replica.level == "full"]
    return bool(replicas) and any(gather(any([bool(_compare(replica, _lowest(replica))) for replica in replicas])))


def _measure(replicas: Sequence[Replica], splits: Sequence[Split]) -> dict[int, dict[LeafPath, Difference]]:
    """Of each component that differs in this rank's group, what differs from a rank that agrees with most.

    Collective over those groups.
    """
    ours = {split.component: split.agreeing[0] for split in splits if split.group == _lowest(replicas[split.component])}
    return {component: _compare(replicas[component], source) for component, source in ours.items()}


def _compare(replica: Replica, source: int) -> dict[LeafPath, Difference]:
    """The tensors in which this rank differs from rank ``source``. Collective over the replica's group."""
    from primus_bridge.megatron.parallel import device

    if dist.get_world_size(replica.group) == 1:
        return {}
    where = torch.device("cpu") if dist.get_backend(replica.group) == "gloo" else device()
    found = leaves(replica.state, (repr(replica.key),))
    tensors = {path: value for path, value in found if isinstance(value, torch.Tensor)}
    differences = {}
    for path in sorted(tensors):  # a mapping may have another order on each rank
        data, size = bytes_of(tensors[path]), tensors[path].dtype.itemsize
        count, largest = 0, 0.0
        for start in range(0, len(data), CHUNK):
            mine = data[start : start + CHUNK].to(where)
            theirs = mine if dist.get_rank() == source else torch.empty_like(mine)
            dist.broadcast(theirs, source, replica.group)
            if not all(torch.equal(*pair) for pair in zip(words(mine), words(theirs), strict=True)):
                unlike = (mine != theirs).view(-1, size).any(dim=1)
                ours, others = (_numbers(part.view(-1, size)[unlike], tensors[path].dtype) for part in (mine, theirs))
                count += len(ours)
                largest = float(np.maximum(largest, (ours - others).abs().max().item()))  # which keeps a NaN
        if count:
            differences[path] = Difference(count, tensors[path].numel(), largest)
    return differences


def _numbers(elements: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Elements as bytes, [n, itemsize], in a dtype that has all their values, [n]."""
    return elements.reshape(-1).view(dtype).to(torch.complex128 if dtype.is_complex else torch.float64)


# --- what all ranks say


def _lowest(replica: Replica) -> int:
    return min(dist.get_process_group_ranks(replica.group or dist.group.WORLD))


def _claims(replicas: Sequence[Replica], summaries: Sequence[dict[LeafPath, Summary]]) -> list[Claim]:
    claims = []
    for replica, summary in zip(replicas, summaries, strict=True):
        assert replica.level in LEVELS, replica.level
        digest = hashlib.sha256(repr(sorted(summary.items())).encode()).digest()
        unknown = [(path, leaf.kind) for path, leaf in summary.items() if not leaf.known]
        claims.append(Claim(replica.key, replica.level, _lowest(replica), digest, unknown))
    return claims


def _splits(everyone: list[list[Claim]]) -> list[Split]:
    """The groups that disagree, by the claims of all ranks. Raises SharedError for claims that do not compare."""
    declared = [", ".join(f"{claim.key} ({claim.level})" for claim in claims) for claims in everyone]
    for rank, theirs in enumerate(declared):
        if theirs != declared[0]:
            raise SharedError(f"the ranks declare other state to compare: rank 0: {declared[0]}; rank {rank}: {theirs}")
    unknown = [
        f"{name_of(path)} on rank {rank} is {what}"
        for rank, claims in enumerate(everyone)
        for claim in claims
        for path, what in claim.unknown
    ]
    if unknown:
        raise SharedError(
            f"state that ranks should hold alike cannot be compared: {_listed(unknown)}; keep tensors, numpy arrays "
            "and plain values in it, or declare the component with validate_replication=False"
        )
    splits = []
    for component in range(len(everyone[0])):
        groups: dict[int, dict[bytes, list[int]]] = {}
        for rank, claims in enumerate(everyone):
            claim = claims[component]
            groups.setdefault(claim.group, {}).setdefault(claim.digest, []).append(rank)
        for group, holders in groups.items():
            # of contents with as many ranks, max takes the first, which is that of the lowest rank
            agreeing = holders.pop(max(holders, key=lambda digest: len(holders[digest])))
            splits += [Split(component, group, agreeing, odd) for odd in holders.values()]
    return splits


def _explain(
    replicas: Sequence[Replica],
    summaries: Sequence[dict[LeafPath, Summary]],
    splits: list[Split],
    differences: dict[int, dict[LeafPath, Difference]],
) -> str:
    """Which ranks differ in what: the same text on every rank. Collective over the world."""
    told = splits[:SHOWN]
    speaking = {split.component for split in told if dist.get_rank() in (split.agreeing[0], split.odd[0])}
    everyone = gather({component: (summaries[component], differences.get(component, {})) for component in speaking})
    lines = []
    for split in told:
        right, _ = everyone[split.agreeing[0]][split.component]
        theirs, measured = everyone[split.odd[0]][split.component]
        lines.append(
            f"{replicas[split.component].key}: {_named(split.odd)} {'differs' if len(split.odd) == 1 else 'differ'} "
            f"from {_named(split.agreeing)} in {_listed(_unlike(theirs, right, measured))}"
        )
    more = f"; and {len(splits) - SHOWN} more groups of ranks" if len(splits) > SHOWN else ""
    return (
        f"ranks that should hold the same state do not: {'; '.join(lines)}{more}; "
        "go on from the last checkpoint: what came after it is not to be trusted"
    )


def _unlike(
    theirs: dict[LeafPath, Summary], right: dict[LeafPath, Summary], measured: dict[LeafPath, Difference]
) -> list[str]:
    """The leaves that differ, each with how it does; of what is missing or of another kind, not what lies inside."""
    told: set[LeafPath] = set()
    lines = []
    for path in [*right, *(path for path in theirs if path not in right)]:
        mine, other = theirs.get(path), right.get(path)
        inside = path[:-1] in told
        if mine != other or inside:
            told.add(path)
        if mine == other or inside:
            continue
        if mine is None or other is None:
            how = "missing" if mine is None else "missing on the others"
        elif mine.kind != other.kind:
            how = f"{mine.kind}, not {other.kind}"
        elif path in measured:
            elements, total, largest = measured[path]
            how = f"{elements} of {total} elements, by {largest:g} at most"
        else:
            how = "other bits"
        lines.append(f"{name_of(path)} ({how})")
    return lines


def _named(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_listed([str(rank) for rank in ranks])}"


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
