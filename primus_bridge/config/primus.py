"""The Primus experiment dialect: one module of an experiment file -> layers of settings."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Optional

from primus_bridge.config import flat
from primus_bridge.config.follow import REPLACES
from primus_bridge.config.merge import Entry, Half, Layer, Noted, Refused, Setting, Target, find, is_section
from primus_bridge.config.native import native_keys
from primus_bridge.config.presets import files_of, folders_of_primus, load_chain, load_preset, preset_file
from primus_bridge.config.yaml_file import Located, locate, parse_scalar, plain
from primus_bridge.errors import ConfigError, did_you_mean

GRANULARITY = "model.recompute_granularity"
ROOT_KEYS = ("work_group", "user_name", "exp_name", "workspace", "platform", "modules")
MODULE_KEYS = ("framework", "config", "model", "overrides", "name")

TURBO = Noted("this kernel of Primus-Turbo changes speed only; Megatron-Core's own is used", neutral=(False, None, 0))
TURBO_SWITCHES = (
    *("use_turbo_async_tp", "use_turbo_autotune", "use_turbo_deepep", "use_turbo_fused_act_with_probs"),
    *("use_turbo_gemm", "use_turbo_grouped_gemm", "use_turbo_grouped_mlp", "use_turbo_grouped_mm"),
    *("use_turbo_parallel_linear", "use_turbo_permute_padding", "disable_turbo_grouped_mlp_low_precision"),
    *("turbo_sync_free_moe_stage", "moe_use_fused_router_with_aux_score"),
)
OF_DEEPEP = Noted("it belongs to use_turbo_deepep", neutral=(32, False, None))
SINK = Noted("it steers Primus's own logger", neutral=(None,))
FOLLOWS_PRECISION = Noted("it follows mixed_precision", neutral=(None,))
FSDP = Refused("fully sharded data parallel is not in this version; use_distributed_optimizer is")
DROPOUT = Refused("LoRA's dropout is always on the adapter's input", neutral=("pre", None))
B_INIT = Refused("LoRA's B starts at zero", neutral=("zero", None))
FORMATTERS = {"openai": "chatml", "messages": "chatml", "bridge_squad": "squad"}

DECAY_ENDS = "weight decay is the same at every step: write weight_decay, or both ends of it (start_, end_), equal"
PLATFORM = "it is Primus's cluster; ranks come from --nproc, torchrun or Slurm, and the folder from workspace"

FP8 = Refused("fp8 is not in this version")


def _never_at_zero(argument: str) -> Target:
    """An interval, of which Megatron takes 0 for none."""
    return Target(argument, Optional[int], lambda steps: steps or None)


# What Primus's presets and examples call things, beside the flat dialect's names.
KEYS: dict[str, Entry] = {
    "peft_dim": Target("peft.dim"),
    "peft_alpha": Target("peft.alpha"),
    "peft_dropout": Target("peft.dropout"),
    "finetune_lr": Target("optimizer.lr"),
    "hf_path": Target("checkpoint.hf_model_name_or_path"),
    "dataset_name": Target("dataset.data_path"),
    "dataset.dataset_name": Target("dataset.data_path"),
    "dataset.hf_dataset": Target("dataset.data_path"),
    "sft_dataset_name": Target("dataset.data_path"),
    "sft_dataset_split": Target("dataset.split"),
    "sft_conversation_format": Target("dataset.prompt_template", str, lambda name: FORMATTERS.get(name, name)),
    "start_weight_decay": Half("optimizer.weight_decay", "end_weight_decay", DECAY_ENDS),
    "end_weight_decay": Half("optimizer.weight_decay", "start_weight_decay", DECAY_ENDS),
    "split": Refused(
        "Megatron's split ratios are not used; write validation_split: 0.05, or sft_dataset_split for a split's name",
        neutral=(None, "99,1,0"),
    ),
    "optimizer": Refused("this version has Adam with decoupled weight decay only", neutral=("adam", "adamw", None)),
    "ckpt_format": Noted("checkpoints are always torch_dist", neutral=("torch_dist", None)),
    "enable_packed_sequences": flat.PACKING,
    "use_packed_attention": Noted("samples of a pack never see one another", neutral=(True, None)),
    "packed_train_data_path": flat.PACKED_FILES,
    "packed_val_data_path": flat.PACKED_FILES,
    "packed_metadata_path": flat.PACKED_FILES,
    "use_megatron_fsdp": FSDP,
    "use_custom_fsdp": FSDP,
    "use_torch_fsdp2": FSDP,
    **{f"*turbo*{kind}*": FP8 for kind in ("float8", "fp8", "mx")},
    **dict.fromkeys(TURBO_SWITCHES, TURBO),
    **dict.fromkeys(("turbo_deepep_num_cu", "turbo_deepep_use_comm_stream"), OF_DEEPEP),
    "comm_overlap_config": Noted("it changes speed only; overlap_grad_reduce is the switch here", neutral=(None,)),
    "fp8": FP8,
    "calculate_per_token_loss": Noted("the loss is always per token, whatever the layout", neutral=(True, None)),
    "cross_entropy_loss_fusion": Noted("it changes speed only; the loss is computed in chunks", neutral=(None,)),
    "decoder_first_pipeline_num_layers": Target("model.num_layers_in_first_pipeline_stage"),
    "decoder_last_pipeline_num_layers": Target("model.num_layers_in_last_pipeline_stage"),
    "disable_tensorboard": Target("logger.tensorboard", bool, lambda no: not no),
    # 0 is no evaluation at all (config/load.py); a null leaves what a flavor says
    "eval_iters": Target("train.eval_iters", Optional[int], null_says_nothing=True),
    "eval_interval": _never_at_zero("train.eval_interval"),
    "save_interval": _never_at_zero("checkpoint.save_interval"),
    **{f"{section}val_proportion": Target("dataset.validation_split") for section in ("", "dataset.")},
    "do_validation": Refused("write eval_iters: 0", neutral=(True, None)),
    "do_test": Noted("there is no test set; evaluations are of the validation set", neutral=(None,)),
    "dataset.mock": Refused("made-up data trains nothing: give dataset_name, or data_path"),
    "[A-Z][A-Z]*_*": Noted("a config sets no environment variable: export it before the command"),
    "pipeline_dtype": FOLLOWS_PRECISION,
    "params_dtype": FOLLOWS_PRECISION,
    "dataset_type": Noted("the format of the rows decides (dataset_format)", neutral=(None,)),
    "trainable": Noted("the module that is run is trained", neutral=(True, None)),
    "sink_level": SINK,
    "file_sink_level": SINK,
    "stderr_sink_level": SINK,
    **{f"{section}.dropout_position": DROPOUT for section in ("lora", "peft")},
    **{f"{section}.lora_B_init_method": B_INIT for section in ("lora", "peft")},
}


@functools.cache
def table() -> dict[str, Entry]:
    """Every name of a module's presets and overrides, and of the command line: the flat dialect's and Primus's."""
    return {**native_keys(), **flat.table(), **KEYS}


@dataclass(frozen=True)
class Experiment:
    """One module of an experiment file, ready to merge."""

    module_name: str
    layers: list[Layer]
    save: Optional[str]
    """workspace/work_group/user_name/exp_name, Primus's rule; None without an exp_name."""
    save_source: str
    wandb_project: Optional[str]
    """work_group_user_name, Primus's rule for a run that is logged and names no project."""


def is_experiment(trees: list[Located]) -> bool:
    """True for this dialect: a file that has, or extends one that has, ``modules``."""
    return any("modules" in tree.value for tree in trees)


def check_root_keys(trees: list[Located]) -> None:
    """Raises ConfigError for a key beside ``modules`` that Primus would drop."""
    for tree in trees:
        for key, node in tree.value.items():
            if key not in ROOT_KEYS:
                raise _misplaced_root_key(key, node)


def read_experiment(trees: list[Located]) -> Experiment:
    """The one megatron_bridge module of an experiment file, given as its ``extends`` chain, bases first.

    The chain is merged key by key, as in Primus. Layers, later wins: what is left of the model preset < of the module
    preset (``config``) < overrides. Raises ConfigError for keys that stand where Primus would drop them, for no such
    module, or for several.
    """
    check_root_keys(trees)
    roots = _merged(trees).value
    modules = _mapping(roots["modules"], "modules")
    for name, module in modules.items():
        _check_module_keys(name, _mapping(module, f"modules.{name}"))
    name = _choose(modules, roots["modules"])
    module = modules[name].value
    overrides = module.get("overrides")
    if overrides is None or overrides.value is None:
        overrides = Located({}, modules[name].where)
    _mapping(overrides, f"modules.{name}.overrides")
    _check_recipe(overrides)
    presets = {"config": Located({}, ""), "model": Located({}, "")}
    for kind in presets:
        node = module.get(kind)
        if node is not None and node.value is not None:
            presets[kind] = _merged(load_preset(node, kind, "megatron_bridge", files_of(trees)))
    # a key of both presets is the module's, with all that the model's has below it
    model = {key: node for key, node in presets["model"].value.items() if key not in presets["config"].value}
    below = [Located(model, presets["model"].where), presets["config"]]
    layers = [*(_layer(_left(tree, overrides)) for tree in below), _without_idle(_layer(overrides))]
    platform = roots.get("platform")
    if platform is not None and platform.value:
        layers.insert(0, Layer(unused={PLATFORM: [(platform.where, "platform")]}))
    save, source = _save(roots)
    return Experiment(name, layers, save, source, _wandb_project(roots))


def _merged(trees: Iterable[Located]) -> Located:
    """Trees as Primus merges them, later ones over former: a mapping joins a mapping, anything else replaces."""
    return functools.reduce(_overlay, trees)


def _overlay(base: Located, over: Located) -> Located:
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    joined = dict(base.value)
    for key, node in over.value.items():
        joined[key] = _overlay(joined[key], node) if key in joined else node
    return Located(joined, over.where)


def _left(base: Located, over: Located) -> Located:
    """What of ``base`` is still there when ``over`` is merged over it."""
    kept = {}
    for key, node in base.value.items():
        above = over.value.get(key)
        if above is None:
            kept[key] = node
        elif isinstance(node.value, dict) and isinstance(above.value, dict):
            kept[key] = _left(node, above)
    return Located(kept, base.where)


def _check_recipe(settings: Located) -> None:
    recipe = settings.value.get("recipe")
    if recipe is not None and recipe.value in (None, "null"):
        raise ConfigError(
            "'recipe' is null, and Primus runs no module without one: name one, with its flavor, or take out the key",
            where=recipe.where,
        )


class MergedLayer(Layer):
    """Settings that Primus merged, where which of two keys was written later is lost.

    preset: keys that say what Primus's model preset says, and yield to another name of the same argument.
    """

    def __init__(self, preset: set[str]) -> None:
        super().__init__(null_is_unset=True)
        self.preset = preset

    def set(self, argument: str, value: Any, source: str, written: str, null: bool = False) -> None:
        before = self.settings.get(argument)
        if before is None or null or before.null or before.value == value:
            super().set(argument, value, source, written, null)
        elif before.written in self.preset:
            self.settings[argument] = Setting(value, source, written)
        elif written not in self.preset:
            raise ConfigError(
                f"'{before.written}' and '{written}' both set {argument}, to {before.value} and {value}, and Primus's "
                "merging loses which is the later one: keep one name, or set the other to null",
                where=source,
            )


def read_params(params: dict, where: str, model: Optional[str] = None) -> Layer:
    """A module's settings that Primus already merged (plain values) -> one layer. model: its model preset's name.

    Raises ConfigError for what cannot be honoured, and for two values under two names of one argument.
    """
    tree = _read_again(locate(params, where))
    _check_recipe(tree)
    return _without_idle(flat.read_layer(tree, table(), MergedLayer(_of_preset(tree, model))))


def _without_idle(layer: Layer) -> Layer:
    """Without what belongs to recomputation where the same layer switches it off: Megatron does not look at it."""
    granularity = layer.settings.get(GRANULARITY)
    if granularity is not None and granularity.value is None:
        idle = [layer.settings.pop(name) for name in REPLACES[GRANULARITY] if name in layer.settings]
        written = [(setting.source, setting.written) for setting in idle if setting.value is not None]
        layer.unused |= {"recompute_granularity is null": written} if written else {}
    return layer


def _of_preset(tree: Located, model: Optional[str]) -> set[str]:
    """The dotted names that have the value which Primus's model preset of that name gives them."""
    folders = folders_of_primus("model", "megatron_bridge") if model else ()
    files = [folder / preset_file(model or "") for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return set()
    merged = dict(_values(tree))
    return {name for name, value in _values(_merged(load_chain(file))) if name in merged and merged[name] == value}


def _values(tree: Located, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, node in tree.value.items():
        if isinstance(node.value, dict):
            yield from _values(node, f"{prefix}{key}.")
        else:
            yield prefix + key, node.value


def _read_again(node: Located) -> Located:
    """Primus leaves 1e-4 on its command line and ${X:null} as text: text is read as our command line reads it."""
    if isinstance(node.value, dict):
        return Located({key: _read_again(item) for key, item in node.value.items()}, node.where)
    return Located(parse_scalar(node.value), node.where, node.value) if isinstance(node.value, str) else node


def _layer(tree: Located) -> Layer:
    return flat.read_layer(tree, table(), Layer(null_is_unset=True))


def _mapping(node: Located, name: str) -> dict[str, Located]:
    if not isinstance(node.value, dict):
        raise ConfigError(f"'{name}' must hold 'key: value' lines, got {plain(node)!r}", where=node.where)
    return node.value


def _misplaced_root_key(key: str, node: Located) -> ConfigError:
    if find(table(), key) is not None or is_section(table(), key):
        instead = "put it"
        if key == "peft" and isinstance(node.value, dict) and set(node.value) <= {"dim", "alpha", "dropout"}:
            # 'peft: lora' is there already, most often
            instead = "write " + ", ".join(f"peft_{name}: {item.value}" for name, item in node.value.items())
        return ConfigError(
            f"'{key}' stands beside 'modules', where Primus drops it: {instead} under modules.NAME.overrides",
            where=node.where,
        )
    return ConfigError(f"unknown key '{key}' at the top level{did_you_mean(key, ROOT_KEYS)}", where=node.where)


def _check_module_keys(name: str, module: dict[str, Located]) -> None:
    for key, node in module.items():
        if key in MODULE_KEYS:
            continue
        hint = did_you_mean(key, MODULE_KEYS)
        if find(table(), key) is not None or is_section(table(), key):
            hint = f": put it under modules.{name}.overrides"
        raise ConfigError(f"unknown key '{key}' in module '{name}'{hint}", where=node.where)


def _choose(modules: dict[str, Located], node: Located) -> str:
    ours: list[str] = []
    others: list[str] = []
    for name, module in modules.items():
        framework = module.value["framework"].value if "framework" in module.value else None
        (ours if framework == "megatron_bridge" else others).append(f"{name} ({framework or 'no framework'})")
    if len(ours) == 1:
        return ours[0].rsplit(" (", 1)[0]
    found = ", ".join(ours + others) or "none"
    raise ConfigError(
        f"exactly one module with 'framework: megatron_bridge' is needed; found: {found}", where=node.where
    )


def _wandb_project(roots: dict[str, Located]) -> Optional[str]:
    names = [roots[key].value for key in ("work_group", "user_name") if key in roots]
    return "_".join(name for name in names if isinstance(name, str)) or None


def _save(roots: dict[str, Located]) -> tuple[Optional[str], str]:
    if "exp_name" not in roots:
        return None, ""
    parts = []
    for key in ("workspace", "work_group", "user_name", "exp_name"):
        node = roots.get(key)
        if node is None or (node.value is None and key != "exp_name"):
            parts.append("output" if key == "workspace" else "")
            continue
        text = node.raw if node.raw is not None else node.value
        if not isinstance(text, str) or not text:
            raise ConfigError(f"'{key}' must be text, got {node.value!r}: put it in quotes", where=node.where)
        parts.append(text)
    source = f"{roots['exp_name'].where} (workspace/work_group/user_name/exp_name)"
    return os.path.expanduser(os.path.join(*parts)), source
