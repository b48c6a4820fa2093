"""The SFTConfig spelling as a table: names known from transformers, TRL and PEFT, flat -> the arguments they set."""

from __future__ import annotations

import functools
from typing import Any

from primus_bridge.config import flat
from primus_bridge.config.follow import ALTERNATIVES
from primus_bridge.config.merge import Entry, Layer, Noted, Refused, Setting, Target, find
from primus_bridge.config.yaml_file import Located, locate

MARK = "base_model"
"""The key by which a file is known to be of this spelling."""

DEFAULTS = {
    "train.num_epochs": 3.0,
    "train.gradient_accumulation_steps": 1,
    "checkpoint.convert_to_hf": True,
    "checkpoint.save_total_limit": 3,
}
"""Where they differ from those of BridgeArguments."""


def _precision(name: str) -> str:
    if name == "fp16":
        raise ValueError("fp16 needs loss scaling, which is not in this version; bf16 needs none")
    return "fp32" if name == "no" else flat.precision(name)


def _decay_style(name: str) -> str:
    styles = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
    if name not in styles:
        raise ValueError(f"unknown schedule '{name}'; there are {', '.join(styles)}")
    return styles[name]


NO_4_BIT = "Megatron-Core holds the base model in bf16 or fp32, not in 4 or 8 bits: write use_lora: true in its place"
OF_QLORA = Noted("it belongs to use_qlora")
ADAM = Refused(
    "this version has AdamW with fp32 state, which data-parallel ranks share out, and no 8-bit or paged one",
    neutral=("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", None),
)
MICRO_BATCH = Target("train.micro_batch_size")
SCHEDULE = Target("scheduler.lr_decay_style", str, _decay_style)
SEQ_LENGTH = Target("model.seq_length")
EPOCHS = Target("train.num_epochs")
WORKERS = Target("dataset.num_workers")

KEYS: dict[str, Entry] = {
    MARK: Target("checkpoint.hf_model_name_or_path", also=lambda _: {"checkpoint.convert_from_hf": True}),
    "tokenizer_name": Target("tokenizer.tokenizer_model"),
    "device_map": Refused(
        "ranks and their devices follow the layout (nproc, tensor_model_parallel_size; device: cpu)",
        neutral=("auto", None),
    ),
    "trust_remote_code": Refused("no code of a model folder is run"),
    "dataset_name": Target("dataset.data_path"),
    "dataset_split": Target("dataset.split"),
    "max_seq_length": SEQ_LENGTH,
    "max_length": SEQ_LENGTH,
    "num_proc": WORKERS,
    "dataset_num_proc": WORKERS,
    "lora_r": Target("peft.dim"),
    "lora_bias": Refused("adapters have no bias", neutral=("none", None)),
    "use_qlora": Refused(NO_4_BIT),
    "load_in_4bit": Refused(NO_4_BIT),
    "load_in_8bit": Refused(NO_4_BIT),
    "bnb_*": OF_QLORA,
    "batch_size": MICRO_BATCH,
    "per_device_train_batch_size": MICRO_BATCH,
    "per_device_eval_batch_size": Noted("evaluations take batch_size"),
    "learning_rate": Target("optimizer.lr"),
    "num_epochs": EPOCHS,
    "max_steps": Target("train.train_iters"),
    "warmup_steps": Target("scheduler.lr_warmup_iters"),
    "warmup_ratio": Target("scheduler.lr_warmup_fraction"),
    "max_grad_norm": Target("optimizer.clip_grad"),
    "mixed_precision": Target("mixed_precision", str, _precision),
    "optimizer_type": ADAM,
    "optim": ADAM,
    "scheduler_type": SCHEDULE,
    "lr_scheduler_type": SCHEDULE,
    "gradient_checkpointing": Target("model.recompute_granularity", bool, lambda on: "full" if on else None),
    "output_dir": Target("checkpoint.save"),
    "logging_steps": Target("logger.log_interval"),
    "eval_steps": Target("train.eval_interval"),
    "save_steps": Target("checkpoint.save_interval"),
}


@functools.cache
def table() -> dict[str, Entry]:
    """Every name of this spelling: these and the flat dialect's."""
    return {**flat.table(), **KEYS}


def in_other_words(name: str) -> str:
    """What to write for a name of this spelling where no file is of it, as the end of a message; "" for other names."""
    entry = find(KEYS, name)
    if not isinstance(entry, Target):
        return f" - {entry.reason}" if entry is not None else ""
    short = entry.argument.rpartition(".")[2]
    known = next((key for key, target in flat.LORA_NAMES.items() if target == Target(entry.argument)), short)
    value = f" {entry.translate(True)}" if entry.kind is bool and entry.translate is not None else ""
    others = "".join(f" with --{argument.rpartition('.')[2]}" for argument in (entry.also(None) if entry.also else ()))
    return f" - that is SFTConfig's; here write --{known}{value}{others}"


def is_config(trees: list[Located]) -> bool:
    """True for a file that names, or extends one that names, a base_model."""
    return any(MARK in tree.value for tree in trees)


def defaults() -> Layer:
    """The lowest layer."""
    source = "default of SFTConfig"
    return Layer({name: Setting(value, source, name) for name, value in DEFAULTS.items()})


def read_layer(tree: Located) -> Layer:
    """The settings of one file's tree. Null stands for leaving a key out, as None does in Python."""
    known = {key: _as_meant(key, node) for key, node in tree.value.items() if not _is_unset(key, node)}
    return flat.read_layer(Located(known, tree.where), table(), Layer(null_is_unset=True))


def read_fields(fields: dict[str, Any], who: str) -> Layer:
    """The keywords of a Python call; ``who`` names the call in messages."""
    return read_layer(Located({name: locate(value, f"{who}({name}=...)") for name, value in fields.items()}, who))


def _is_unset(key: str, node: Located) -> bool:
    """Whether the value leaves the length or the batch of a run to the other keys: null, and -1 steps."""
    entry = table().get(key)
    argument = entry.argument if isinstance(entry, Target) else None
    if node.value == -1:
        return argument == "train.train_iters"
    return node.value is None and argument in (*ALTERNATIVES, *ALTERNATIVES.values())


def _as_meant(key: str, node: Located) -> Located:
    """YAML reads ``mixed_precision: no`` as false."""
    return Located("no", node.where) if key == "mixed_precision" and node.value is False else node
