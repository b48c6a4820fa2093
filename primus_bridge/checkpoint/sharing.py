"""Who holds, writes and reads each copy of a state component, and in which file: pure functions of ranks and groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Sequence

from primus_bridge.checkpoint.components import SharingPattern, StateComponent
from primus_bridge.errors import ConfigError

STATE = "state"
"""Folder inside a checkpoint: the components that are no shards."""

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Ranking:
    """The ranks of a job: how many, in which process groups (name -> its groups), on which machines."""

    world_size: int
    groups: Mapping[str, Sequence[Ranks]]
    nodes: Sequence[Ranks]


def copies(component: StateComponent, ranking: Ranking) -> list[Ranks]:
    """The sets of ranks that share a copy, in the order of their first ranks; together all ranks of the job."""
    pattern = component.sharing_pattern
    if pattern is SharingPattern.PER_RANK:
        return [(rank,) for rank in range(ranking.world_size)]
    if pattern is SharingPattern.PER_NODE:
        return sorted(ranking.nodes)
    if pattern is SharingPattern.PER_GROUP:
        name = component.process_group_name or ""
        if name not in ranking.groups:
            raise ConfigError(
                f"process group {name!r} is none of this run's: {', '.join(sorted(ranking.groups))}",
                where=f"state component {component.key!r}",
            )
        return sorted(tuple(sorted(group)) for group in ranking.groups[name])
    return [tuple(range(ranking.world_size))]


def own_copy(component: StateComponent, ranking: Ranking, rank: int) -> Ranks:
    """The ranks that share the copy of ``rank``; the first of them writes it."""
    return next(ranks for ranks in copies(component, ranking) if rank in ranks)


def file_name(component: StateComponent, ranking: Ranking, ranks: Ranks) -> str:
    """The copy's file inside a checkpoint.

    Named by what does not depend on who reads: a rank, a group's lowest rank (a reader's place inside its group would
    name another group's file), a machine's number in the order of ranks.
    """
    pattern, key = component.sharing_pattern, component.key
    if pattern is SharingPattern.PER_RANK:
        key += f".rank_{ranks[0]:05d}"
    elif pattern is SharingPattern.PER_GROUP:
        key += f".{component.process_group_name}_{ranks[0]:05d}"
    elif pattern is SharingPattern.PER_NODE:
        key += f".node_{sorted(ranking.nodes).index(ranks):05d}"
    return f"{STATE}/{key}.pt"
