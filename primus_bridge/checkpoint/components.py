"""What a run's state is made of: StateComponent names a piece of it and says how ranks share it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional, Protocol, runtime_checkable

from primus_bridge.errors import ConfigError, did_you_mean

LEVELS = ("none", "quick", "tensor", "full")
"""How thoroughly copies that should be equal are compared (see replication.py)."""


SHARDED = ("model", "optimizer")
"""Keys of what Megatron shards."""


class SharingPattern(str, Enum):
    """Which ranks hold the same copy of a piece of state; the first rank of each such set writes it."""

    GLOBAL = "global"
    """One copy for the job, asked of rank 0 alone; every rank that has the object reads it."""
    PER_RANK = "per_rank"
    """Each rank has its own."""
    REPLICATED = "replicated"
    """Every rank has it, and all are equal; rank 0 writes."""
    PER_GROUP = "per_group"
    """The ranks of one process group share a copy; another group has another."""
    PER_NODE = "per_node"
    """The ranks of one machine share a copy."""


@runtime_checkable
class Stateful(Protocol):
    """What a component keeps: nested dicts, lists and tuples of plain values and tensors."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


@runtime_checkable
class ReshapedStateful(Stateful, Protocol):
    """State of ranks that has a rule for another layout, where those ranks are no more."""

    def layout_changed(self, step: int) -> None:
        """Called in place of load_state_dict when the checkpoint of ``step`` was saved by other ranks."""
        ...


# a part of a file's name
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class StateComponent:
    """One piece of state: ``stateful`` (None on a rank that has no copy) under ``key``, shared as the pattern says.

    sharing_pattern: or its value, "per_rank". process_group_name: for PER_GROUP, one of the trainer's
    get_process_groups(). required: a checkpoint without it cannot be resumed. validate_replication: copies are compared
    before each save, at validation_level. metadata: {"format": "torch_dist"} for state that Megatron shards itself;
    else free.
    """

    key: str
    stateful: Any
    sharing_pattern: SharingPattern
    process_group_name: Optional[str] = None
    required: bool = True
    validate_replication: bool = False
    validation_level: str = "quick"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"state component {self.key!r}"
        if not _KEY.fullmatch(self.key):
            raise ConfigError("its key must be made of letters, digits, - and _: it names files", where=where)
        try:
            object.__setattr__(self, "sharing_pattern", SharingPattern(self.sharing_pattern))
        except ValueError:
            patterns = [pattern.value for pattern in SharingPattern]
            given = str(self.sharing_pattern)
            raise ConfigError(
                f"its sharing_pattern {given!r} is none{did_you_mean(given, patterns)}; they are {', '.join(patterns)}",
                where=where,
            ) from None
        if (self.sharing_pattern is SharingPattern.PER_GROUP) != (self.process_group_name is not None):
            raise ConfigError("process_group_name belongs to the pattern PER_GROUP, and only to it", where=where)
        compared = (SharingPattern.REPLICATED, SharingPattern.PER_GROUP)
        if self.validate_replication and self.sharing_pattern not in compared:
            raise ConfigError("validate_replication compares copies: it is for REPLICATED and PER_GROUP", where=where)
        if self.validation_level not in LEVELS:
            raise ConfigError(
                f"validation_level {self.validation_level!r} must be one of {', '.join(LEVELS)}", where=where
            )
        if self.sharded and self.key not in SHARDED:
            raise ConfigError(f"the format torch_dist is for {' and '.join(SHARDED)}: leave it out", where=where)
        try:
            json.dumps(self.metadata)
        except TypeError as error:
            raise ConfigError(f"its metadata is written as JSON: {error}", where=where) from None
        if self.stateful is not None and not self.sharded and not isinstance(self.stateful, Stateful):
            raise ConfigError(
                f"a {type(self.stateful).__name__} has no state_dict and load_state_dict: give it both, or wrap it",
                where=where,
            )

    @property
    def sharded(self) -> bool:
        """Whether Megatron's torch_dist saves it, and not a file of its own."""
        return self.metadata.get("format") == "torch_dist"
