"""The callbacks of a run, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Iterable

from primus_bridge.callbacks.base import Callback, CallbackList
from primus_bridge.callbacks.metrics import MetricsCallback
from primus_bridge.callbacks.progress import ProgressCallback
from primus_bridge.config.arguments import BridgeArguments


def build_callbacks(arguments: BridgeArguments, more: Iterable[Callback] = ()) -> CallbackList:
    """The run's own, then those of logger.callbacks, then ``more`` (objects of a Python caller)."""
    return CallbackList([MetricsCallback(), ProgressCallback(), *more])
