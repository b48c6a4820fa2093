"""When each part of a step begins and ends, as Megatron's schedules and optimizer tell it to their timers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from megatron.core.utils import get_model_config

from primus_bridge.megatron.optimizer import parts

STEP = "forward-backward"
"""Megatron's name of all forward and backward passes of a step, and of the reduction of their gradients."""


class Phases:
    """Stands where Megatron looks for its timers: calls ``began`` and ``ended`` with the name of each part."""

    def __init__(self, began: Callable[[str], None], ended: Callable[[str], None]):
        self._began, self._ended = began, ended

    def __call__(self, name: str, log_level: Optional[int] = None) -> _Timer:
        return _Timer(name, self._began, self._ended)


class _Timer:
    def __init__(self, name: str, began: Callable[[str], None], ended: Callable[[str], None]):
        self._name, self._began, self._ended = name, began, ended

    def start(self, barrier: bool = False) -> None:
        self._began(self._name)

    def stop(self, barrier: bool = False) -> None:
        self._ended(self._name)


def listen(chunks: list, optimizer: Any, phases: Optional[Phases]) -> None:
    """Tell ``phases`` from now on; None: nobody, which costs a step nothing."""
    for chunk in chunks:
        get_model_config(chunk).timers = phases
    for each in parts(optimizer):
        each.config.timers = phases
