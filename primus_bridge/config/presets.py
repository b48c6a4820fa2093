"""Configuration files by name: ``extends`` chains, presets and recipes, and where they are looked up."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Collection, Iterable, Iterator, Optional

import primus_bridge
from primus_bridge.config.environment import substitute
from primus_bridge.config.yaml_file import Located, load_yaml
from primus_bridge.errors import ConfigError, did_you_mean

DOCUMENTED_CONFIGS = Path("configs/megatron_bridge")
"""Where the documented commands have their configs."""


def load_chain(path: str | os.PathLike, shown: Optional[str] = None, above: tuple = ()) -> list[Located]:
    """The file and what it ``extends``, bases first: a later tree wins over a former one.

    Variables are substituted; ``extends`` is taken out. Bases are relative to the file that names them.
    Raises ConfigError for a missing base or files that extend each other.
    """
    path, shown = Path(path), shown or os.path.normpath(str(path))
    tree = substitute(load_yaml(path, shown))
    bases = tree.value.pop("extends", None)
    chain: list[Located] = []
    here = (*above, path.resolve())
    for base in _names(bases):
        base_path = path.parent / base
        base_shown = base if os.path.isabs(base) else os.path.normpath(os.path.join(os.path.dirname(shown), base))
        if base_path.resolve() in here:
            raise ConfigError(f"'extends: {base}' leads back to this file", where=bases.where)
        if not base_path.is_file():
            raise ConfigError(f"'extends': no such file: {base_shown}", where=bases.where)
        chain += load_chain(base_path, base_shown, here)
    return [*chain, tree]


def load_preset(node: Located, kind: str, framework: str, run: Collection[Path] = ()) -> list[Located]:
    """The chain of a preset named by ``config:``, ``model:`` or ``recipe:``.

    Looked up beside the file that names it, then in the recipes of this package, then in an installed Primus; a recipe
    without a path or an ending among the recipes first. The naming file is never meant, nor one of ``run``, the files
    of the run's own config, resolved. kind: 'config', 'model' or 'recipe'. Raises ConfigError that lists where it
    looked and the nearest name.
    """
    name = node.value
    if not isinstance(name, str) or not name:
        raise ConfigError(f"'{kind}' must be the name of a preset file, got {name!r}", where=node.where)
    file = preset_file(name)
    naming = Path(node.where.rpartition(":")[0])  # the file that names it; "." on a command line
    places = list(_places(kind, naming.parent, framework))
    if kind == "recipe" and name != file and "/" not in name:
        places.reverse()
    not_meant = {naming.resolve(), *run}
    for folder, shown in places:
        if (folder / file).is_file() and (folder / file).resolve() not in not_meant:
            return load_chain(folder / file, os.path.normpath(os.path.join(shown, file)))
    names = sorted({path.name for folder, _ in places if folder.is_dir() for path in folder.glob("*.yaml")})
    looked = ", ".join(shown or "." for _, shown in places)
    there = f"; the recipes are {', '.join(recipe_names())}" if kind == "recipe" else ""
    raise ConfigError(
        f"no preset '{file}' for '{kind}' in {looked}{did_you_mean(file, names)}{there}", where=node.where
    )


def files_of(trees: Iterable[Located]) -> set[Path]:
    """The files of a chain, resolved."""
    return {Path(tree.where.rpartition(":")[0]).resolve() for tree in trees}


def recipe_names() -> list[str]:
    """The whole recipes of this package, a name a model and method: 'qwen3_8b_sft', 'qwen3_8b_lora', ..."""
    names = (path.stem for path in recipes_folder().glob("*.yaml"))
    return sorted(name for name in names if name.endswith(("_sft", "_lora")))


def recipes_folder() -> Path:
    """The folder of the shipped presets."""
    return _shipped("recipes")


def shipped_example(path: str) -> Optional[Path]:
    """The example that stands for ``configs/megatron_bridge/NAME.yaml`` where no such file is; None for other paths.

    Raises ConfigError, with the names there are, when there is no example of that name either.
    """
    if Path(path).parent != DOCUMENTED_CONFIGS or Path(path).exists():
        return None
    example = _shipped("examples") / Path(path).name
    if not example.is_file():
        names = sorted(file.name for file in example.parent.glob("*.yaml"))
        hint = did_you_mean(example.name, names)
        raise ConfigError(f"no such file; the examples are {', '.join(names)}{hint}", where=path)
    return example


def folders_of_primus(kind: str, framework: str) -> Iterator[Path]:
    """Where an installed Primus has its presets of this kind ('config' or 'model')."""
    spec = importlib.util.find_spec("primus")
    for root in (spec.submodule_search_locations if spec else None) or ():
        for name in (framework, "megatron"):  # a native preset: its keys are understood too
            folder = Path(root) / "configs" / {"config": "modules", "model": "models"}[kind] / name
            if folder.is_dir():
                yield folder


def preset_file(name: str) -> str:
    """A preset's file name: the ending may be left out."""
    return name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"


def _shipped(name: str) -> Path:
    """A folder of shipped files: of the installed package, or of a checkout that is not installed."""
    spec = importlib.util.find_spec(f"primus_bridge.{name}")
    for location in (spec.submodule_search_locations if spec else None) or ():
        return Path(location)
    return Path(primus_bridge.__file__).resolve().parent.parent / name


def _names(bases: Optional[Located]) -> list[str]:
    if bases is None or bases.value is None:
        return []
    names = bases.value if isinstance(bases.value, list) else [bases.value]
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"'extends' must be a file name or a list of them, got {bases.value!r}", where=bases.where)
    return names


def _places(kind: str, beside: Path, framework: str) -> Iterator[tuple[Path, str]]:
    yield beside, str(beside)
    yield recipes_folder(), "recipes"
    if kind != "recipe":
        for folder in folders_of_primus(kind, framework):
            yield folder, str(folder)
