"""An experiment file and its presets, merged: each module's settings as one namespace."""

import os
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def joined(base, over):
    """``over`` on ``base``: a mapping joins a mapping, anything else replaces, and a key keeps its place."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: joined(base[key], value) if key in base else value for key, value in over.items()}


def read(path):
    tree = yaml.safe_load(path.read_text())
    bases = [read(path.parent / name) for name in tree.pop("extends", [])]
    return reduce(joined, [*bases, tree])


def nested(value):
    return SimpleNamespace(**{k: nested(v) for k, v in value.items()}) if isinstance(value, dict) else value


def settings(name, module):
    """The module's preset, what it leaves open of the model's, then the overrides."""
    model = read(CONFIGS / "models" / "megatron_bridge" / module["model"])
    below = model | {"model": module["model"]} | read(CONFIGS / "modules" / "megatron_bridge" / module["config"])
    return joined(below, module.get("overrides") or {}) | {"name": name}


def load_primus_config(config_path, cli_args=None):
    experiment = read(Path(config_path))
    place = [experiment[key] for key in ("workspace", "work_group", "user_name", "exp_name")]
    modules = [
        SimpleNamespace(name=name, framework=module["framework"], params=nested(settings(name, module)))
        for name, module in experiment["modules"].items()
    ]
    return SimpleNamespace(modules=modules, exp_root_path=os.path.join(*place))
