"""Every shipped recipe and example parses in the dialect it is written in, and the whole ones make a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from primus_bridge.config import load_arguments
from primus_bridge.config.validate import validate

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path):
    words = ["--data_path", "d", "--save", "s"]
    arguments = load_arguments(str(path), words)
    assert arguments.notes == []
    if path.stem.endswith(("_sft", "_lora")):
        validate(arguments)
        assert arguments.stage == "sft"
        assert (arguments.peft.scheme == "lora") == path.stem.endswith("_lora")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path):
    arguments = load_arguments(str(path), [])
    validate(arguments)
    assert arguments.stage == "sft"


def test_presets_make_an_experiment(tmp_path):
    models = [path.name for path in RECIPES if "_trainer" not in path.name and "_base" not in path.name]
    models = [name for name in models if not name.removesuffix(".yaml").endswith(("_sft", "_lora"))]
    assert len(models) == 4
    for model in models:
        for config in ("sft_trainer.yaml", "lora_trainer.yaml", "pretrain_trainer.yaml"):
            file = tmp_path / "experiment.yaml"
            file.write_text(
                "exp_name: x\nmodules:\n  m:\n    framework: megatron_bridge\n"
                f"    config: {config}\n    model: {model}\n    overrides: {{data_path: d}}\n"
            )
            validate(load_arguments(str(file), []))
