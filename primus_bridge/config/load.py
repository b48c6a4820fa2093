"""From a config file and overrides to BridgeArguments: which dialect, which layers, which stage."""

from __future__ import annotations

from pathlib import Path
from typing import Collection, Optional

from primus_bridge.config import flat, primus, schema, sft
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.flat import STAGE_OF_WORD
from primus_bridge.config.flavors import PRETRAIN, FlavorLayer, check_trainable, flavor_layer, is_flavor, of_bridge
from primus_bridge.config.merge import Layer, Setting, build
from primus_bridge.config.overrides import read_overrides
from primus_bridge.config.presets import files_of, load_chain, load_preset, shipped_example
from primus_bridge.config.run_yaml import DIGESTS, believe, digest
from primus_bridge.config.yaml_file import Located, plain
from primus_bridge.errors import ConfigError


def load(
    config_path: Optional[str], overrides: list[str], stage: Optional[str], keywords: Optional[Layer] = None
) -> BridgeArguments:
    """See load_arguments. keywords: those of SFTConfig, in the place of a command line."""
    example = shipped_example(config_path) if config_path is not None else None
    trees = load_chain(example or config_path) if config_path is not None else []
    experiment = primus.read_experiment(trees) if primus.is_experiment(trees) else None
    spelled = not experiment and sft.is_config(trees)
    names = {**primus.table(), **sft.KEYS} if spelled else primus.table()
    command_line = read_overrides(overrides, names, sft.in_other_words) if keywords is None else keywords
    read = sft.read_layer if spelled else _flat_layer
    layers = experiment.layers if experiment else [read(tree) for tree in trees]
    default = "pretrain" if experiment else "sft"
    below = _named_below([*layers, command_line], STAGE_OF_WORD.get(stage or "", default), files_of(trees))
    layers = [*below, *layers, command_line]
    if spelled or (keywords is not None and not trees):
        layers = [sft.defaults(), *layers]

    arguments = build(layers)
    _choose_stage(arguments, stage, default)
    if experiment:
        _primus_save(arguments, experiment)
        if arguments.logger.wandb and arguments.logger.wandb_project is None:
            schema.put(arguments, "logger.wandb_project", experiment.wandb_project, "work_group and user_name")
    if experiment or any(isinstance(layer, FlavorLayer) for layer in below):
        _primus_weights(arguments)
    _settle(arguments, layers)
    if example is not None:
        arguments.notes.append(f"{config_path} is the example of that name, {example}")
    if arguments.checkpoint.save is None:
        name = Path(config_path).stem if config_path is not None else arguments.stage
        save = f"runs/{name}-{_digest(arguments)}"
        schema.put(arguments, "checkpoint.save", save, "default (no save is given)")
        arguments.notes.append(f"no save is given: the run is in {save}")
    return arguments


def _digest(arguments: BridgeArguments) -> str:
    """Eight letters for what the run is: the same command finds its folder again, another one gets its own."""
    what = arguments.to_dict()
    for section in ("logger", "dist", "shape"):
        del what[section]
    return digest(what)


def _flat_layer(tree: Located) -> Layer:
    record = tree.value.get("sources")
    if record is None or not isinstance(record.value, dict):
        return flat.read_layer(tree, flat.table())
    del tree.value["sources"]  # run.yaml's record of the run it came from; a list is dataset.sources
    digests = tree.value.pop(DIGESTS, None)
    layer = flat.read_layer(tree, flat.table())
    known = plain(digests) if digests is not None else None
    believe(layer, plain(record), known if isinstance(known, dict) else {})
    return layer


def _named_below(layers: list[Layer], stage: str, run: Collection[Path] = ()) -> list[Layer]:
    """The layers of the recipe or the flavor that the last of the layers to name one names; they come below all others.

    ``recipe`` alone is a file of ours; beside a ``flavor``, as in Primus's model presets, it names a file of functions
    of Megatron-Bridge, of which another layer may name the flavor. stage: the one that is run when no layer says so.
    run: see load_preset.
    """
    named = [(layer.settings.pop("recipe", None), layer.settings.pop("flavor", None)) for layer in layers]
    named = [pair for pair in named if any(pair)]
    if not named:
        return []
    recipe, flavor = named[-1]
    if recipe is not None and flavor is None and of_bridge(recipe.value):
        flavor = _flavor_below(recipe, named)
    if flavor is not None:
        functions = (recipe for recipe, flavor in reversed(named) if recipe and (flavor or of_bridge(recipe.value)))
        return [_flavor_layer(recipe or next(functions, None), flavor, layers, stage)]
    assert recipe is not None
    if is_flavor(recipe.value):
        check_trainable(None, recipe.value, recipe.source)
        raise ConfigError(
            f"'{recipe.value}' is a flavor, and no recipe: write flavor: {recipe.value} (--flavor {recipe.value})",
            where=recipe.source,
        )
    preset = load_preset(Located(recipe.value, recipe.source), "recipe", "megatron_bridge", run)
    found = [_flat_layer(tree) for tree in preset]
    for layer in found:
        if "recipe" in layer.settings and "flavor" not in layer.settings:
            raise ConfigError("a recipe cannot name a recipe: use 'extends'", where=layer.settings["recipe"].source)
    return [*_named_below([*found, *layers], stage, run), *found]


def _flavor_below(recipe: Setting, named: list[tuple[Optional[Setting], Optional[Setting]]]) -> Setting:
    """The flavor beside a file of Megatron-Bridge's functions, of the last layer to name one."""
    flavor = next((flavor for _, flavor in reversed(named) if flavor), None)
    if flavor is not None:
        return flavor
    check_trainable(recipe.value, None, recipe.source)
    raise ConfigError(
        f"recipe '{recipe.value}' is a file of Megatron-Bridge's functions: name one of them too "
        "(flavor: qwen3_8b_finetune_config), or a recipe of this package (recipe: qwen3_8b_sft)",
        where=recipe.source,
    )


def _flavor_layer(recipe: Optional[Setting], flavor: Setting, layers: list[Layer], stage: str) -> Layer:
    named = (recipe.value if recipe else None, flavor.value, flavor.source)
    check_trainable(*named)
    stages = [layer.settings["stage"].value for layer in layers if "stage" in layer.settings]
    if [stage, *stages][-1] == "sft":
        return flavor_layer(*named, layers)
    reason = f"the defaults of '{flavor.value}' are for fine-tuning, and this stage is pretrain"
    if flavor.value.endswith(PRETRAIN):
        reason = "there is no table of the defaults of pretraining flavors; the values are the config's"
    return Layer(unused={reason: [(flavor.source, flavor.written)]})


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


def _primus_save(arguments: BridgeArguments, experiment: primus.Experiment) -> None:
    if arguments.checkpoint.save is None and experiment.save is not None:
        schema.put(arguments, "checkpoint.save", experiment.save, experiment.save_source)


def _primus_weights(arguments: BridgeArguments) -> None:
    checkpoint = arguments.checkpoint
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


def _settle(arguments: BridgeArguments, layers: list[Layer]) -> None:
    """What the merged arguments say together: no evaluation, and LoRA's keys without LoRA."""
    if arguments.train.eval_iters == 0:
        source = f"{arguments.sources['train.eval_iters']} (eval_iters: 0)"
        for argument, value in (("eval_iters", None), ("validation_split", 0.0), ("validation_data_path", None)):
            section = "train" if argument == "eval_iters" else "dataset"
            schema.put(arguments, f"{section}.{argument}", value, source)
    if arguments.peft.scheme is not None:
        return
    if arguments.sources["peft.scheme"] == "default":
        _refuse_lora_without_scheme(arguments, layers)
        return
    decides = max(index for index, layer in enumerate(layers) if "peft.scheme" in layer.settings)
    for layer in layers[decides:]:  # those of a preset below are taken back
        unused = [
            (setting.source, setting.written)
            for argument, setting in layer.settings.items()
            if argument.startswith("peft.") and argument != "peft.scheme" and not setting.null
        ]
        arguments.notes += Layer(unused={"full fine-tuning has no adapters": unused} if unused else {}).all_notes()


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
    # what Primus adds to say which module this is; a text as 'model' is the name of the preset that it merged
    added = ("framework_name", "name", "config", "model_name", "trainer_class")
    params = {key: value for key, value in params.items() if key not in added}
    model = params.pop("model") if isinstance(params.get("model"), str) else None
    layer = primus.read_params(params, "Primus module settings", model)
    arguments = build([*_named_below([layer], "pretrain"), layer])
    _choose_stage(arguments, None, default="pretrain")
    _primus_weights(arguments)
    _settle(arguments, [layer])
    return arguments
