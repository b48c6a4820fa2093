"""The defaults of Megatron-Bridge's recipes: equal to its functions', below everything else, told with their name."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from primus_bridge.config import load_arguments, schema
from primus_bridge.config.flavors import ENDINGS, FLAVORS, adam_eps, defaults
from primus_bridge.config.validate import validate

BRIDGE = os.environ.get("PRIMUS_BRIDGE_PYTHON_WITH_BRIDGE")
MODULE = """\
exp_name: run
modules:
  post_trainer:
    framework: megatron_bridge
    overrides:
      stage: sft
      recipe: {recipe}
      flavor: {flavor}
"""


@pytest.fixture
def flavored(write):
    """Arguments of a module with a flavor and these overrides (lines)."""

    def make(*lines: str, flavor="qwen3_8b_finetune_config", recipe="qwen.qwen3", words=()):
        text = MODULE.format(recipe=recipe, flavor=flavor) + "".join(f"      {line}\n" for line in lines)
        return load_arguments(write(text), list(words))

    return make


@pytest.mark.skipif(BRIDGE is None, reason="PRIMUS_BRIDGE_PYTHON_WITH_BRIDGE names no python with megatron-bridge")
def test_the_functions_of_the_real_package():
    """Of the installed version: 0.3.1 has the *_sft_config and *_peft_config ones, Primus's 0.3.0rc0 the others."""
    assert BRIDGE is not None
    names = [name + ending for name in FLAVORS for ending in ENDINGS]
    script = Path(__file__).with_name("bridge_recipes.py")
    done = subprocess.run([BRIDGE, str(script), *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    real = json.loads(done.stdout)
    assert len(real) >= 2 * len(FLAVORS)
    for called, theirs in real.items():
        name, peft, packed = called.split()
        ending = next(ending for ending in ENDINGS if name.endswith(ending))
        row = FLAVORS[name.removesuffix(ending)]
        scheme = None if peft == "None" else "lora"
        mine = defaults(row, scheme, peft == "dora", packed == "True", adam_eps(ending))
        assert theirs.pop("data") == "squad" and mine["dataset.data_path"] == "rajpurkar/squad"
        assert ("peft.dim" in theirs) == (mine.get("peft.scheme") == "lora"), called
        for argument, value in theirs.items():
            default = False if argument == "model.sequence_parallel" else None
            default = 1 if argument == "model.expert_model_parallel_size" else default
            value = default if value is None else value
            assert mine.get(argument, default) == value, (called, argument)


def test_every_row_is_of_arguments_and_makes_a_run(flavored):
    for name, row in FLAVORS.items():
        for ending in ENDINGS:
            arguments = flavored(flavor=name + ending, recipe=row.family.recipe)
            validate(arguments)
            assert arguments.peft.scheme == (None if ending == "_sft_config" else "lora")
            assert arguments.dataset.packed_sequence == (ending != "_finetune_config")
            assert arguments.checkpoint.convert_from_hf is True
        for values in (defaults(row, scheme, False, True, 1e-5) for scheme in ("lora", None)):
            assert set(values) <= set(schema.fields())


@pytest.mark.parametrize(
    "lines, expected",
    [
        ((), {"peft.scheme": "lora", "optimizer.lr": 1e-4, "model.tensor_model_parallel_size": 1, "peft.alpha": 32.0}),
        (('peft: "none"',), {"peft.scheme": None, "optimizer.lr": 5e-6, "model.tensor_model_parallel_size": 4}),
        (("peft: null",), {"peft.scheme": None, "optimizer.lr": 5e-6, "peft.dim": 16}),
        (("peft: dora",), {"peft.use_dora": True, "peft.alpha": 64.0}),
        (("peft: {dim: 4}",), {"peft.dim": 4, "peft.alpha": 32.0, "optimizer.lr": 1e-4}),
        (("packed_sequence: true",), {"train.global_batch_size": 8}),
        (("finetune_lr: 3e-4", "seed: 7"), {"optimizer.lr": 3e-4, "rng.seed": 7, "scheduler.lr_warmup_iters": 50}),
        (("dataset_name: tatsu-lab/alpaca",), {"dataset.prompt_template": "auto", "dataset.validation_split": 0.1}),
        (("dataset_name: data/squad",), {"dataset.prompt_template": "squad"}),
        (("data: {sources: [a.json]}",), {"dataset.data_path": None, "dataset.prompt_template": "auto"}),
        (("validation_data_path: v.json",), {"dataset.validation_split": 0.0}),
        (("streaming: true",), {"dataset.validation_split": 0.0}),
        (("streaming: false",), {"dataset.validation_split": 0.1}),
        (("num_epochs: null",), {"train.train_iters": 1000}),
        (("lr_warmup_fraction: null",), {"scheduler.lr_warmup_iters": 50}),
        (("validation_data_path: null",), {"dataset.validation_split": 0.1}),
        (("streaming: null",), {"dataset.validation_split": 0.1}),
        (("eval_iters: null",), {"train.eval_iters": 32}),
        (("eval_interval: 0",), {"train.eval_interval": None, "train.eval_iters": 32}),
        (("num_epochs: 2",), {"train.num_epochs": 2.0, "scheduler.lr_decay_iters": None}),
        (("lr_warmup_fraction: 0.1",), {"scheduler.lr_warmup_iters": 0}),
        (("pretrained_checkpoint: c",), {"checkpoint.convert_from_hf": False}),
    ],
)
def test_what_a_user_says_comes_before_it(flavored, lines, expected):
    arguments = flavored(*lines)
    validate(arguments)
    for argument, value in expected.items():
        assert schema.get(arguments, argument) == value, argument
    assert arguments.sources["optimizer.adam_beta2"] == "flavor qwen3_8b_finetune_config"


def test_recompute_of_the_large_one_can_be_switched_off(flavored):
    assert flavored(flavor="qwen3_32b_finetune_config").model.recompute_method == "uniform"
    arguments = flavored("recompute_granularity: null", flavor="qwen3_32b_finetune_config")
    validate(arguments)
    assert (arguments.model.recompute_granularity, arguments.model.recompute_method) == (None, None)


def test_a_decay_that_ends_before_the_run_is_told(flavored):
    qwen2 = dict(flavor="qwen25_7b_finetune_config", recipe="qwen.qwen2")
    arguments = flavored("train_iters: 500", **qwen2)
    validate(arguments)
    assert any("from step 100 on the rate is min_lr" in note for note in arguments.notes)
    arguments = flavored("train_iters: 500", "lr_decay_iters: null", **qwen2)
    validate(arguments)
    assert arguments.notes == []


def test_experts_and_uneven_ends(flavored):
    arguments = flavored(flavor="qwen3_235b_a22b_finetune_config", recipe="qwen.qwen3_moe")
    model = arguments.model
    assert (model.expert_model_parallel_size, model.sequence_parallel) == (4, True)
    assert model.num_layers_in_first_pipeline_stage == 23
    assert len(arguments.notes) == 1 and "(moe_aux_loss_coeff 1e-3), and this version has none" in arguments.notes[0]
    written = flavored(
        "pipeline_model_parallel_size: 4", flavor="qwen3_235b_a22b_finetune_config", recipe="qwen.qwen3_moe"
    )
    assert written.model.num_layers_in_first_pipeline_stage == 23  # as many as the default
    arguments = flavored(
        "pipeline_model_parallel_size: 1", flavor="qwen3_235b_a22b_sft_config", recipe="qwen.qwen3_moe"
    )
    assert arguments.model.num_layers_in_first_pipeline_stage is None
    validate(arguments)


@pytest.mark.parametrize(
    "recipe, flavor, message",
    [
        ("qwen.qwen3", "qwen3_9b_finetune_config", "no table of the defaults of flavor 'qwen3_9b_finetune_config'"),
        ("qwen.qwen3", "qwen3_8b_pretrain_config", "did you mean 'qwen3_8b_peft_config'"),
        ("qwen.qwen3", "qwen3_8b", "no table of the defaults of flavor 'qwen3_8b'"),
        ("llama.llama3", "qwen3_8b_finetune_config", "is of recipe 'qwen.qwen3', not of 'llama.llama3'"),
        ("mamba.mamba2", "mamba2_370m_finetune_config", "state-space"),
        ("zebra_llama.zebra_llama", "zebra_llama_1b_finetune_config", "state-space"),
        ("primus.recipes.mlperf_llama2_70b.llama2_custom", "llama2_70b_lora_mxfp4_config", "MXFP4"),
    ],
)
def test_a_flavor_that_cannot_be_used_is_refused_by_name(write, refuse, recipe, flavor, message):
    text = refuse(write(MODULE.format(recipe=recipe, flavor=flavor)))
    assert text.startswith("config.yaml:8: ") and message in text and flavor in text


def test_pretraining_takes_no_defaults_of_fine_tuning(write):
    text = MODULE.format(recipe="qwen.qwen3", flavor="qwen3_8b_finetune_config").replace(
        "stage: sft", "stage: pretrain"
    )
    arguments = load_arguments(write(text), ["--data_path", "d"])
    assert (arguments.peft.scheme, arguments.rng.seed) == (None, 1234)
    assert "'flavor' has no effect here: the defaults of 'qwen3_8b_finetune_config'" in arguments.notes[0]
    theirs = text.replace("_finetune_", "_pretrain_")
    assert "there is no table of the defaults of pretraining" in load_arguments(write(theirs), []).notes[0]


def test_recipe_and_flavor_come_from_different_files(write, refuse):
    """As Primus merges them, key by key."""
    head = "modules:\n  m:\n    framework: megatron_bridge\n    config: sft_trainer.yaml\n"
    module = head + "{}    overrides: {{recipe: {}}}\n"
    preset = "    model: qwen3_8b.yaml\n"
    arguments = load_arguments(write(module.format(preset, "qwen.qwen3")), [])
    assert arguments.sources["optimizer.lr"] == "flavor qwen3_8b_finetune_config"
    message = refuse(write(module.format(preset, "llama.llama3")))
    assert "flavor 'qwen3_8b_finetune_config' is of recipe 'qwen.qwen3', not of 'llama.llama3'" in message
    message = refuse(write(module.format("", "qwen.qwen3")))
    assert message.startswith("config.yaml:5: recipe 'qwen.qwen3' is a file of Megatron-Bridge's functions: name one")


@pytest.mark.parametrize(
    "name, message",
    [
        ("mamba.mamba2", "recipe 'mamba.mamba2' cannot be used: its layers are state-space ones"),
        ("mamba2_370m_finetune_config", "flavor 'mamba2_370m_finetune_config' cannot be used: its layers are state-"),
        ("qwen3_8b_finetune_config", "is a flavor, and no recipe: write flavor: qwen3_8b_finetune_config (--flavor"),
    ],
)
def test_other_names_as_a_recipe(refuse, name, message):
    assert message in refuse(None, ["--recipe", name])


def test_a_bare_name_is_a_recipe_of_the_package_and_a_path_a_file(write):
    """A file of the recipe's name, which extends it by naming it; and a folder with one's own of that name."""
    own = write("recipe: llama3.2_1b_sft\ndata_path: d\n", "llama3.2_1b_sft.yaml")
    for arguments in (load_arguments(own, []), load_arguments(None, ["--recipe", "llama3.2_1b_sft"])):
        assert arguments.checkpoint.hf_model_name_or_path == "meta-llama/Llama-3.2-1B"
    write("hf_path: mine\nlr: 1\n".replace("hf_path", "hf_model_name_or_path"), "recipes/mine.yaml")
    arguments = load_arguments(None, ["--recipe", "recipes/mine"])
    assert arguments.checkpoint.hf_model_name_or_path == "mine"
    write("hf_model_name_or_path: beside\n", "beside.yaml")
    assert load_arguments(None, ["--recipe", "beside"]).checkpoint.hf_model_name_or_path == "beside"


def test_flavors_and_recipes_in_the_flat_dialect(write, refuse):
    flat = "recipe: qwen.qwen3\nflavor: qwen3_8b_finetune_config\nlr: 1e-3\n"
    arguments = load_arguments(write(flat), [])
    validate(arguments)
    assert (arguments.optimizer.lr, arguments.peft.scheme) == (1e-3, "lora")
    # the last to name one decides
    arguments = load_arguments(write(flat), ["--recipe", "llama3.2_1b_sft", "--data_path", "d"])
    assert (arguments.peft.scheme, arguments.checkpoint.hf_model_name_or_path) == (None, "meta-llama/Llama-3.2-1B")
    assert arguments.optimizer.lr == 1e-3
    # a model preset as a recipe brings its flavor
    arguments = load_arguments(None, ["--recipe", "llama3.1_8b", "--train_iters", "70"])
    validate(arguments)
    assert (arguments.train.train_iters, arguments.peft.dim) == (70, 8)
    assert arguments.sources["peft.dim"] == "flavor llama31_8b_finetune_config"
    message = refuse(None, ["--recipe", "llama3.3_1b_sft"])
    assert "did you mean 'llama3.2_1b_sft.yaml'" in message and "the recipes are gemma2_27b_lora, " in message
