"""What a dotted path of the user's names: imported from the installed packages or the current folder."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from primus_bridge.errors import ConfigError, did_you_mean


def imported(path: str, what: str, *, example: str, where: str) -> Any:
    """The callable at ``module.name``; the module is the user's own code, and runs.

    what, example: what the path should name ("function"), and such a path. Raises ConfigError at ``where`` for a path
    that is none, a module that fails, or a name that it does not have.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ConfigError(f"'{path}' is no dotted path of a {what}, such as {example}", where=where)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file named as an installed package does not hide that
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may do anything
        told = "it ends the program (sys.exit)" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"cannot import '{module_name}' (from {os.getcwd()} or the installed packages): {told}", where=where
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        wrong = f"is no {what}" if hasattr(module, name) else f"does not exist{did_you_mean(name, dir(module))}"
        raise ConfigError(f"'{name}' {wrong} in {_place(module)}", where=where)
    return found


def _place(module: ModuleType) -> str:
    """What the user can open: the module's file, or the folder that was imported in place of a module in it."""
    file = getattr(module, "__file__", None)
    if file is not None:
        return file
    folders = list(getattr(module, "__path__", ()))
    if not folders:
        return f"Python's own module '{module.__name__}'"
    return f"{folders[0]}, a folder: name a module in it, as {module.__name__}.MODULE.NAME"
