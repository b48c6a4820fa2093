"""Every shipped recipe and example parses in the dialect it is written in, and the whole ones make a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from primus_bridge.config import load_arguments
from primus_bridge.config.presets import recipe_names
from primus_bridge.config.validate import check_ranks, layout_size, validate
from primus_bridge.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
BASES = ("_trainer", "_base", "_recipe")
REFUSED = {
    "llama2_70b_lora_mxfp4": "MXFP4",
    "mamba_130M": "state-space",
    "mamba_370M": "state-space",
    "zebra_llama_1B": "state-space",
    "zebra_llama_3B": "state-space",
    "zebra_llama_8B": "state-space",
}
WHOLE = [path for path in RECIPES if path.stem in recipe_names()]
MODELS = [path for path in RECIPES if path not in WHOLE and not path.stem.endswith(BASES) and path.stem not in REFUSED]
OF_PRIMUS = ("qwen3_8b", "qwen3_32b", "qwen3_30b_a3b", "llama3_8b", "llama31_70b", "llama2_70b")


def test_each_model_has_a_preset_and_two_recipes():
    names = {path.stem for path in MODELS}
    assert len(names) == 20 and names >= set(OF_PRIMUS)
    assert {path.stem for path in WHOLE} == {f"{name}_{method}" for name in names for method in ("sft", "lora")}
    assert {path.stem for path in RECIPES} == {
        *names,
        *recipe_names(),
        *REFUSED,
        *(path.stem for path in RECIPES if path.stem.endswith(BASES)),
    }


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_whole_recipe(path):
    words = ["--data_path", "d", "--save", "s"]
    arguments = load_arguments(str(path), words)
    assert arguments.notes == []
    assert load_arguments(None, ["--recipe", path.stem, *words]).to_dict() == arguments.to_dict()
    validate(arguments)
    assert arguments.stage == "sft"
    assert (arguments.peft.scheme == "lora") == path.stem.endswith("_lora")
    assert (arguments.checkpoint.convert_from_hf, arguments.checkpoint.convert_to_hf) == (True, True)
    line = path.read_text().splitlines()[0]
    gpus = next(count for count in (8, 16, 32) if f" on {count} GPUs" in line)
    assert gpus == 8 or path.stem.endswith("_sft")
    check_ranks(arguments, gpus)
    assert layout_size(arguments) <= gpus


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.endswith(BASES)], ids=lambda path: path.name)
def test_base(path):
    assert load_arguments(str(path), ["--save", "s"]).notes == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path):
    arguments = load_arguments(str(path), [])
    validate(arguments)
    assert arguments.stage == "sft"


@pytest.fixture
def experiment(tmp_path):
    """An experiment of two presets."""

    def make(model: str, config: str) -> str:
        file = tmp_path / "experiment.yaml"
        file.write_text(
            "exp_name: x\nmodules:\n  m:\n    framework: megatron_bridge\n"
            f"    config: {config}\n    model: {model}.yaml\n    overrides: {{data_path: d}}\n"
        )
        return str(file)

    return make


@pytest.mark.parametrize("config", ["sft_trainer.yaml", "lora_trainer.yaml", "pretrain_trainer.yaml"])
def test_presets_make_an_experiment(experiment, config):
    for model in MODELS:
        arguments = load_arguments(experiment(model.stem, config), [])
        validate(arguments)
        assert arguments.mixed_precision == "bf16_mixed"
        assert arguments.stage == ("pretrain" if config.startswith("pretrain") else "sft")
        if config == "sft_trainer.yaml":  # Primus's own has no numbers: those are the model preset's
            source = arguments.sources["optimizer.lr"]
            assert source.startswith("flavor " if "flavor" in model.read_text() else "recipes/sft_base.yaml:")


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_primus_that_cannot_be_trained_here_says_why(experiment, name):
    for config in ("sft_trainer.yaml", "pretrain_trainer.yaml"):
        with pytest.raises(ConfigError) as caught:
            load_arguments(experiment(name, config), [])
        assert f"recipes/{name}.yaml:" in str(caught.value) and REFUSED[name] in str(caught.value)
