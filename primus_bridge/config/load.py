"""From a config file and overrides to BridgeArguments: which dialect, which layers, which stage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Optional

from primus_bridge.config import flat, primus, schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.merge import Layer, Setting, build
from primus_bridge.config.overrides import read_overrides
from primus_bridge.config.presets import load_chain, load_preset
from primus_bridge.config.yaml_file import Located
from primus_bridge.errors import ConfigError

STAGE_OF_WORD = {"posttrain": "sft", "sft": "sft", "pretrain": "pretrain"}


def load(config_path: Optional[str], overrides: list[str], stage: Optional[str]) -> BridgeArguments:
    """See load_arguments."""
    # 'recipe' on the command line is ours; in a Primus preset it names a Megatron-Bridge function
    command_line = read_overrides(overrides, {**primus.table(), "recipe": flat.RECIPE})
    trees = load_chain(config_path) if config_path is not None else []
    experiment = primus.read_experiment(trees) if primus.is_experiment(trees) else None
    layers = experiment.layers if experiment else [_flat_layer(tree) for tree in trees]
    layers = [*_recipe_layers([*layers, command_line]), *layers, command_line]

    arguments = build(layers)
    _choose_stage(arguments, stage, default="pretrain" if experiment else "sft")
    if experiment:
        _primus_defaults(arguments, experiment)
    if arguments.peft.scheme is None and arguments.sources["peft.scheme"] == "default":
        _refuse_lora_without_scheme(arguments, layers)
    if arguments.checkpoint.save is None:
        name = Path(config_path).stem if config_path is not None else arguments.stage
        save = f"runs/{name}-{_digest(arguments)}"
        schema.put(arguments, "checkpoint.save", save, "default (no save is given)")
        arguments.notes.append(f"no save is given: the run is in {save}")
    return arguments


def _digest(arguments: BridgeArguments) -> str:
    """Eight letters for what the run is: the same command finds its folder again, another one gets its own."""
    what = arguments.to_dict()
    for section in ("logger", "dist"):
        del what[section]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def _flat_layer(tree: Located) -> Layer:
    record = tree.value.get("sources")
    if record is not None and isinstance(record.value, dict):
        del tree.value["sources"]  # run.yaml's record of the run it came from; a list is dataset.sources
    return flat.read_layer(tree, flat.table())


def _recipe_layers(layers: list[Layer]) -> list[Layer]:
    """The layers of the recipe that a config file or the command line names; they come below all others."""
    named: list[Setting] = [layer.settings.pop("recipe") for layer in layers if "recipe" in layer.settings]
    if not named:
        return []
    node = Located(named[-1].value, named[-1].source)
    recipe = [_flat_layer(tree) for tree in load_preset(node, "recipe", "megatron_bridge")]
    for layer in recipe:
        if "recipe" in layer.settings:
            setting = layer.settings["recipe"]
            raise ConfigError("a recipe cannot name a recipe: use 'extends'", where=setting.source)
    return recipe


def _choose_stage(arguments: BridgeArguments, word: Optional[str], default: str) -> None:
    explicit = arguments.sources["stage"] != "default"
    if word is None:
        if not explicit:
            arguments.stage = "sft" if default == "sft" else "pretrain"
        return
    if word not in STAGE_OF_WORD:
        raise ConfigError(f"unknown stage '{word}'; the stages are pretrain, and sft (posttrain)", where="command line")
    if explicit and arguments.stage != STAGE_OF_WORD[word]:
        raise ConfigError(
            f"stage is {arguments.stage}, but '{word}' on the command line runs {STAGE_OF_WORD[word]}: keep one",
            where=arguments.sources["stage"],
        )
    if not explicit:
        schema.put(arguments, "stage", STAGE_OF_WORD[word], f"command line {word}")


def _primus_defaults(arguments: BridgeArguments, experiment: primus.Experiment) -> None:
    checkpoint = arguments.checkpoint
    if arguments.sources["checkpoint.save"] == "default" and experiment.save is not None:
        schema.put(arguments, "checkpoint.save", experiment.save, experiment.save_source)
    weights_elsewhere = checkpoint.load or checkpoint.pretrained_checkpoint
    if (
        arguments.stage == "sft"
        and checkpoint.hf_model_name_or_path
        and not weights_elsewhere
        and arguments.sources["checkpoint.convert_from_hf"] == "default"
    ):
        # Primus converts the weights of hf_path itself when a post-training config names no checkpoint
        source = f"{arguments.sources['checkpoint.hf_model_name_or_path']} (hf_path without pretrained_checkpoint)"
        schema.put(arguments, "checkpoint.convert_from_hf", True, source)


def _refuse_lora_without_scheme(arguments: BridgeArguments, layers: list[Layer]) -> None:
    for layer in reversed(layers):
        for argument, setting in layer.settings.items():
            if argument.startswith("peft.") and arguments.sources[argument] == setting.source:
                raise ConfigError(
                    f"{setting.written} is set but use_lora is not: add use_lora: true (--use_lora), "
                    "or use_lora: false for full fine-tuning",
                    where=setting.source,
                )


def from_params(params: dict) -> BridgeArguments:
    """The settings of a module that Primus itself read and merged, without files or lines."""
    where = "Primus module settings"
    # what Primus adds to say which module this is
    params = {
        key: value for key, value in params.items() if key not in ("framework_name", "name", "config", "model_name")
    }
    layer = primus.read_params(params, where)
    arguments = build([layer])
    _choose_stage(arguments, None, default="pretrain")
    _primus_defaults(arguments, primus.Experiment("", [layer], None, ""))
    if arguments.peft.scheme is None and arguments.sources["peft.scheme"] == "default":
        _refuse_lora_without_scheme(arguments, [layer])
    return arguments
