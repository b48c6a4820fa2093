"""The callbacks of a run, in the order in which they are told: ours, those the configuration names, the caller's."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from primus_bridge.callbacks.base import HOOKS, Callback, CallbackList, blamed
from primus_bridge.callbacks.checkpointing import CheckpointCallback
from primus_bridge.callbacks.metrics import MetricsCallback
from primus_bridge.callbacks.progress import ProgressCallback
from primus_bridge.callbacks.report import ReportCallback
from primus_bridge.callbacks.validation import ValidationCallback
from primus_bridge.callbacks.wandb import WandBCallback
from primus_bridge.callbacks.wandb_login import check_package
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.dotted import imported
from primus_bridge.errors import ConfigError, did_you_mean

BY_NAME = {kind.__name__: kind for kind in (ValidationCallback, CheckpointCallback, WandBCallback)}
"""Those of ours that logger.callbacks may name without a path."""

Keywords = dict[str, Any]


def build_callbacks(arguments: BridgeArguments, more: Iterable[Callback] = ()) -> CallbackList:
    """The run's own, then those of logger.callbacks, then ``more`` (objects of a Python caller).

    Raises ConfigError when one cannot be made, or lacks something in this run.
    """
    chosen = [*(_made(kind, keywords, arguments) for kind, keywords in _named(arguments)), *more]
    own: list[Callback] = [MetricsCallback(), ProgressCallback()]
    if arguments.logger.report:
        own.append(ReportCallback())
    if arguments.logger.uses_wandb and not any(isinstance(callback, WandBCallback) for callback in chosen):
        own.append(WandBCallback())
    check_objects([*own, *chosen], arguments)
    return CallbackList([*own, *chosen])


def check_callbacks(arguments: BridgeArguments) -> None:
    """Raises ConfigError for a callback of logger.callbacks that does not exist or does not take its keywords.

    The user's modules are imported; nothing is made yet.
    """
    list(_named(arguments))
    if arguments.logger.uses_wandb:
        check_package()


def check_objects(callbacks: Iterable[Callback], arguments: BridgeArguments) -> None:
    """Raises ConfigError for what is no callback, or lacks something in this run."""
    for callback in callbacks:
        kind = type(callback)
        if isinstance(callback, type):
            name = callback.__qualname__
            raise ConfigError(f"{name} is a class: give an object of it, {name}(...)", where="the callbacks")
        _check_class(kind, "the callbacks")
        try:
            callback.check(arguments)
        except ConfigError:
            raise
        except Exception as error:  # the user's own code may do anything
            raise blamed(kind, "in check", error) from error


def _check_class(kind: type, where: str) -> None:
    """Raises ConfigError for a class that is no Callback, or whose ``on_...`` methods are no hooks."""
    if not issubclass(kind, Callback):
        raise ConfigError(f"{kind.__qualname__} is no Callback: derive it from primus_bridge.Callback", where=where)
    for name in dir(kind):
        if name.startswith("on_") and name not in HOOKS:
            raise ConfigError(
                f"{kind.__qualname__}.{name} would never be called{did_you_mean(name, HOOKS)}; "
                f"the hooks are {', '.join(HOOKS)}",
                where=where,
            )


def _named(arguments: BridgeArguments) -> Iterator[tuple[type[Callback], Keywords]]:
    """(class, keywords) of each entry of logger.callbacks."""
    where = _where(arguments)
    for given in arguments.logger.callbacks:
        keywords = dict(given)
        path = keywords.pop("path", None)
        if not isinstance(path, str) or not path:
            raise ConfigError(
                "a callback is a dotted path such as my_callbacks.Sampler, or a mapping of 'path' and its keywords; "
                f"got {given!r}",
                where=where,
            )
        if "." not in path and path not in BY_NAME:
            raise ConfigError(
                f"unknown callback '{path}'{did_you_mean(path, BY_NAME)}; by name alone: {', '.join(BY_NAME)}",
                where=where,
            )
        kind = BY_NAME.get(path) or imported(path, "callback", example="my_callbacks.Sampler", where=where)
        if not isinstance(kind, type):
            raise ConfigError(f"'{path}' is no class: name a subclass of primus_bridge.Callback", where=where)
        _check_class(kind, where)
        _check_keywords(kind, path, keywords, where)
        yield kind, keywords


def _check_keywords(kind: type, path: str, keywords: Keywords, where: str) -> None:
    taken = inspect.signature(kind).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, parameter in taken.items() if parameter.kind in by_keyword]
    for name in keywords:
        if name not in names and not free:
            hint = f"{did_you_mean(name, names)}; it takes {', '.join(names) or 'none'}"
            raise ConfigError(f"unknown key '{name}' of {path}{hint}", where=where)
    missing = [name for name in names if taken[name].default is taken[name].empty and name not in keywords]
    if missing:
        raise ConfigError(f"{path} needs {', '.join(missing)}: write {{path: {path}, {missing[0]}: ...}}", where=where)


def _made(kind: type[Callback], keywords: Keywords, arguments: BridgeArguments) -> Callback:
    try:
        return kind(**keywords)
    except ConfigError as error:
        raise ConfigError(str(error), where=_where(arguments)) from error
    except Exception as error:  # the user's constructor may do anything
        raise blamed(kind, "when it was made", error) from error


def _where(arguments: BridgeArguments) -> str:
    source = arguments.sources.get("logger.callbacks", "default")
    return "logger.callbacks" if source == "default" else source
