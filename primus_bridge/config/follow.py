"""Arguments that follow others: train_iters from num_epochs and the data, global_batch_size from the ranks."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from fractions import Fraction
from typing import Any

from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError

ALTERNATIVES = {
    "train.train_iters": "train.num_epochs",
    "train.global_batch_size": "train.gradient_accumulation_steps",
}
"""The argument that follows -> the one that may be given in its place."""

REPLACES: dict[str, tuple[str, ...]] = {
    "dataset.sources": ("dataset.data_path",),
    "dataset.data_path": ("dataset.sources",),
    "dataset.validation_data_path": ("dataset.validation_split",),
    "scheduler.lr_warmup_fraction": ("scheduler.lr_warmup_iters",),
    "scheduler.lr_warmup_iters": ("scheduler.lr_warmup_fraction",),
    "model.recompute_granularity": ("model.recompute_method", "model.recompute_num_layers"),
    "model.pipeline_model_parallel_size": (
        "model.num_layers_in_first_pipeline_stage",
        "model.num_layers_in_last_pipeline_stage",
    ),
}
"""What a layer's own argument takes the place of in the layers below, where it cannot stand beside it."""

UNCOUNTED = "follows num_epochs once the sequences are counted"


def keep_later(arguments: BridgeArguments, settings: Container[str]) -> None:
    """A layer that sets one of two alternatives takes back the other, which a layer below has set."""
    for pair in ALTERNATIVES.items():
        for mine, other in (pair, pair[::-1]):
            if mine in settings and other not in settings and schema.get(arguments, mine) is not None:
                schema.put(arguments, other, schema.get(BridgeArguments(), other), "default")


def replaces(own: str, value: Any) -> bool:
    """Whether ``value`` of an argument takes the place of others (REPLACES): a null does not, where it is no value."""
    if own == "model.recompute_granularity":  # null: nothing is recomputed
        return True
    return value is not None and value is not False and value != []


def take_back(arguments: BridgeArguments, settings: Mapping[str, Any]) -> list[str]:
    """Before a layer is set: take back what layers below say in whose place it stands; a note for each."""
    notes = []
    for own, others in REPLACES.items():
        setting = settings.get(own)
        if setting is None or not replaces(own, setting.value):
            continue
        if arguments.sources[own] != "default" and schema.get(arguments, own) == setting.value:
            continue  # it is not changed
        for argument in others:
            before, default = schema.get(arguments, argument), schema.get(BridgeArguments(), argument)
            if argument in settings or before == default:
                continue
            notes.append(
                f"{setting.source}: '{setting.written}' takes the place of {argument.partition('.')[2]} {before} "
                f"({arguments.sources[argument]})"
            )
            schema.put(arguments, argument, default, "default")
    return notes


def check_alternatives(arguments: BridgeArguments) -> None:
    """Raises ConfigError when both of two alternatives are given."""
    for follower, leader in ALTERNATIVES.items():
        source = arguments.sources.get(follower, "default")
        if schema.get(arguments, leader) is None or source == "default" or source.startswith("follows "):
            continue
        raise ConfigError(
            f"{leader.partition('.')[2]} and {follower.partition('.')[2]} ({source}) are both set: keep one",
            where=arguments.sources.get(leader),
        )
    if arguments.train.num_epochs is not None and not steps_are_known(arguments):
        arguments.sources["train.train_iters"] = UNCOUNTED


def steps_are_known(arguments: BridgeArguments) -> bool:
    """False as long as train_iters waits for the number of sequences."""
    waits = arguments.sources.get("train.train_iters", "default") in ("default", UNCOUNTED)
    return arguments.train.num_epochs is None or not waits


def steps_of_epochs(num_epochs: float, sequences: int, global_batch_size: int, given: int = 0) -> int:
    """Optimizer steps of what is left of so many passes over so many sequences, of which ``given`` are behind; the last
    step may go on into another pass."""
    # the decimal that was written, not the float next to it: 1.1 of 10 sequences are 11
    left = Fraction(str(num_epochs)) * sequences - given
    return max(0, math.ceil(left / global_batch_size))


def follow_epochs(arguments: BridgeArguments, sequences: int, given: int = 0, step: int = 0) -> None:
    """With num_epochs: fill train_iters in place, with its source.

    sequences: of one epoch. given: of those of all epochs, what the steps up to ``step`` have trained on, at whatever
    batch size.
    """
    train = arguments.train
    if train.num_epochs is None:
        return
    steps = step + steps_of_epochs(train.num_epochs, sequences, train.global_batch_size, given)
    schema.put(
        arguments, "train.train_iters", steps, f"follows num_epochs {train.num_epochs:g} of {sequences:,} sequences"
    )


def follow_accumulation(arguments: BridgeArguments, data_parallel: int) -> None:
    """With gradient_accumulation_steps: fill global_batch_size in place, with its source."""
    train = arguments.train
    if train.gradient_accumulation_steps is None:
        return
    size = train.micro_batch_size * train.gradient_accumulation_steps * data_parallel
    source = (
        f"follows micro_batch_size {train.micro_batch_size} x gradient_accumulation_steps "
        f"{train.gradient_accumulation_steps} x {data_parallel} data-parallel rank{'s' if data_parallel > 1 else ''}"
    )
    schema.put(arguments, "train.global_batch_size", size, source)
