"""The source files that a user's module depends on: its own, and those that it imports from the current folder."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path


def own_files(module: str) -> dict[str, Path]:
    """By name: the loaded ``module``'s file, and those of all that it imports, however far, from the current folder.

    Import statements are read, wherever they stand, and nothing is run: the answer does not depend on what else is
    loaded. Installed packages are left out, those of an environment below the current folder too.
    """
    first = getattr(sys.modules[module], "__file__", None)
    files = {module: Path(first)} if first else {}
    names = [module]
    for name in names:  # grows while it is read
        file = files.get(name) or _file(name)
        if file is None or not (name in files or _is_own(file)):
            continue
        files[name] = file
        if _is_own(file):
            package = name if file.stem == "__init__" else name.rpartition(".")[0]
            names += sorted(set(_imports(file, package)).difference(names))
    return files


def _is_own(file: Path) -> bool:
    here, prefix = Path.cwd(), Path(sys.prefix)
    if not file.is_relative_to(here) or (prefix.is_relative_to(here) and file.is_relative_to(prefix)):
        return False
    return not {"site-packages", "dist-packages"}.intersection(file.relative_to(here).parts)


def _file(name: str) -> Path | None:
    """Where a module lies; None when there is no such module, or it has no file."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # __main__ has none
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # importlib.util would run the package to look into it
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", list(spec.submodule_search_locations))
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _imports(file: Path, package: str) -> Iterator[str]:
    """The names that the file's import statements may mean, with the packages that hold them."""
    if file.suffix != ".py":
        return
    try:
        statements = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):  # of a module that is not imported yet; the import will tell
        return
    for node in statements:
        named: list[str] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if node.level else []
            base = [*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])]
            named = [".".join([*base, alias.name]) for alias in node.names]
        for name in named:
            parts = name.split(".")
            yield from (".".join(parts[: k + 1]) for k in range(len(parts)))
