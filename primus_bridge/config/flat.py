"""The flat dialect as a table: what a user may write -> the argument it sets."""

from __future__ import annotations

import functools
from typing import Any, Literal, Optional

from primus_bridge.config import schema
from primus_bridge.config.merge import Entry, Layer, Noted, Refused, Table, Target, read_tree
from primus_bridge.config.yaml_file import Located

# A section of a file and the argument sections whose fields it may hold, under their own names.
SECTIONS = {
    "model": ("model",),
    "train": ("train",),
    "training": ("train", "optimizer", "scheduler", "rng"),
    "optimizer": ("optimizer",),
    "scheduler": ("scheduler",),
    "lora": ("peft",),
    "peft": ("peft",),
    "data": ("dataset", "tokenizer"),
    "dataset": ("dataset",),
    "parallelism": ("model", "ddp"),
    "ddp": ("ddp",),
    "checkpointing": ("checkpoint",),
    "checkpoint": ("checkpoint",),
    "logging": ("logger",),
    "logger": ("logger",),
    "profiling": ("profiling",),
    "rng": ("rng",),
    "dist": ("dist",),
    "distributed": ("dist",),
    "tokenizer": ("tokenizer",),
}

PRECISIONS = {
    "fp32": "fp32",
    "32": "fp32",
    "32-true": "fp32",
    "float32": "fp32",
    "bf16": "bf16_mixed",
    "bfloat16": "bf16_mixed",
    "bf16_mixed": "bf16_mixed",
    "bf16-mixed": "bf16_mixed",
}


def precision(name: str) -> str:
    """'bf16' and its spellings -> 'bf16_mixed'; 'fp32' and its spellings -> 'fp32'."""
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision '{name}'; this version has fp32 and bf16_mixed")
    return PRECISIONS[name]


def lora_scheme(name: Optional[str]) -> Optional[str]:
    """'lora' turns LoRA on, 'dora' too (and use_dora with it); 'none' and null are full fine-tuning."""
    if name is None or name.lower() in ("none", "full"):
        return None
    if name.lower() not in ("lora", "dora"):
        raise ValueError(f"unknown scheme '{name}'; this version has lora, dora, and none for full fine-tuning")
    return "lora"


def _is_dora(name: Optional[str]) -> bool:
    return name is not None and name.lower() == "dora"


USE_LORA = Target("peft.scheme", bool, lambda on: "lora" if on else None)
PEFT_SCHEME = Target(
    "peft.scheme",
    Optional[str],
    lora_scheme,
    also=lambda name: {"peft.use_dora": True} if _is_dora(name) else {},
    # over a file that has 'peft: dora', 'peft: lora' switches it off
    otherwise=lambda name: {} if _is_dora(name) or lora_scheme(name) is None else {"peft.use_dora": False},
)
PRECISION = Target("mixed_precision", str, precision)
BF16 = Target("mixed_precision", bool, lambda on: "bf16_mixed" if on else "fp32")
NO_SAVE_OPTIM = Target("checkpoint.save_optim", Optional[bool], lambda no: not no)
MOST_RECENT_K = Target("checkpoint.save_total_limit", Optional[int], lambda k: None if k == -1 else k)
RECIPE = Target("recipe", str)
STAGE_OF_WORD = {"pretrain": "pretrain", "sft": "sft", "posttrain": "sft"}
SMOOTHING = Refused("the loss is the cross entropy of the tokens themselves", neutral=(0, None))

LORA_NAMES = {
    "use_lora": USE_LORA,
    "lora_rank": Target("peft.dim"),
    "lora_alpha": Target("peft.alpha"),
    "lora_dropout": Target("peft.dropout"),
    "lora_target_modules": Target("peft.target_modules"),
    "use_rslora": Target("peft.use_rslora"),
    "use_dora": Target("peft.use_dora"),
}
PRECISION_NAMES = {"precision": PRECISION, "precision_config": PRECISION, "mixed_precision": PRECISION, "bf16": BF16}
PACKING = Target("dataset.packed_sequence")
PACKED_FILES = Refused("samples are packed from data_path when a run starts; give the rows, and packed_sequence: true")


def _specs_on(specs: Optional[dict]) -> bool:
    unknown = sorted(set(specs or {}) - {"packed_sequence_size"})
    if unknown:
        raise ValueError(f"of packed_sequence_specs only packed_sequence_size is known here, not {', '.join(unknown)}")
    size = (specs or {}).get("packed_sequence_size", -1)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"packed_sequence_size must be a whole number, got {size!r}")
    return size > 0


# in Megatron-Bridge the specs switch packing on, and a pack is as long as they say
PACKING_SPECS = Target(
    "dataset.packed_sequence",
    Optional[dict[str, Any]],
    _specs_on,
    also=lambda specs: {"model.seq_length": specs["packed_sequence_size"]} if _specs_on(specs) else {},
)
FP16 = Refused("fp16 with loss scaling is not in this version; bf16: true is")
# Megatron gathers in the hook before a module's forward pass, which the adapters and the output layer do not go through
GATHER = Noted("parameters are gathered right after the optimizer's step, which changes speed only")
USE_WANDB = Target("logger.wandb", bool)
NO_WANDB = Target("logger.wandb", bool, lambda no: not no)
WANDB_NAME = Target("logger.wandb_exp_name")
REPORT_TO = Target(
    "logger.wandb",
    Literal["none", "wandb", "tensorboard", "all"],
    lambda name: name in ("wandb", "all"),
    also=lambda name: {"logger.tensorboard": name in ("tensorboard", "all")},
)

NSYS = Refused("nsys is started around the command: nsys profile primus train ...; use_pytorch_profiler has traces")
# of Megatron-Bridge's section, beside the names that the arguments have
PROFILING_NAMES: dict[str, Entry] = {
    "use_nsys_profiler": NSYS,
    "nvtx_ranges": NSYS,
    "record_memory_history": Refused("a run measures its memory by phase in any case: SAVE/memory.json"),
    "memory_snapshot_path": Noted("it belongs to record_memory_history, which is not in this version"),
}

OF_PRECISION = Noted("it follows mixed_precision", neutral=(None,))

# Of Megatron-Bridge's ConfigContainer, as engine bridge prints it; its other fields are in container_keys.yaml.
CONTAINER_NAMES: dict[str, Entry] = {
    "dataset.samples": Refused("it is how engine bridge prints the section dataset: put its keys there", neutral=()),
    "mixed_precision.bf16": BF16,
    "mixed_precision.fp32": Target("mixed_precision", bool, lambda on: "fp32" if on else "bf16_mixed"),
    "mixed_precision.params_dtype": OF_PRECISION,
    "mixed_precision.pipeline_dtype": OF_PRECISION,
    "mixed_precision.grad_reduce_in_fp32": Target("ddp.grad_reduce_in_fp32"),
    "optimizer.use_distributed_optimizer": Target("ddp.use_distributed_optimizer"),
    "validation.eval_interval": Target("train.eval_interval"),
    "validation.eval_iters": Target("train.eval_iters"),
}

# Primus's train options, which say how its own process runs
PRIMUS_OPTIONS: dict[str, Entry] = {
    "backend_path": Refused(
        "Megatron-Core is the one that is installed, whose version is checked: pip install the other, or run in "
        "Primus's runtime (python -m primus_bridge.integrations.primus), which takes it"
    ),
    "export_config": Refused("--dry_run prints the merged arguments, and a run writes them to SAVE/run.yaml"),
}

# Names beside the fields' own.
ALIASES: dict[str, Entry] = {
    "framework": Target("framework", Literal["megatron_bridge"]),
    "stage": Target("stage", Literal["pretrain", "sft", "posttrain"], STAGE_OF_WORD.__getitem__),
    "label_smoothing": SMOOTHING,
    "label_smoothing_factor": SMOOTHING,
    "recipe": RECIPE,
    "flavor": Target("flavor", str),
    **PRECISION_NAMES,
    **LORA_NAMES,
    "peft": PEFT_SCHEME,
    "fp16": FP16,
    "model.load": Target("checkpoint.load"),
    "model.pretrained_checkpoint": Target("checkpoint.pretrained_checkpoint"),
    "model.convert_from_hf": Target("checkpoint.convert_from_hf"),
    "model.hf_model_name_or_path": Target("checkpoint.hf_model_name_or_path"),
    "training.seq_length": Target("model.seq_length"),
    "training.recompute_granularity": Target("model.recompute_granularity"),
    "training.recompute_method": Target("model.recompute_method"),
    "training.recompute_num_layers": Target("model.recompute_num_layers"),
    "training.fp16": FP16,
    **{f"training.{name}": entry for name, entry in PRECISION_NAMES.items()},
    **{f"lora.{name}": entry for name, entry in LORA_NAMES.items()},
    "lora.enabled": USE_LORA,
    "lora.rank": Target("peft.dim"),
    "peft.peft_scheme": PEFT_SCHEME,
    "peft.enabled": USE_LORA,
    "data.seq_length": Target("model.seq_length"),
    "dataset.seq_length": Target("model.seq_length"),
    "dataset.packed_sequence_specs": PACKING_SPECS,
    "packed_sequence_specs": PACKING_SPECS,
    **{f"{section}packing": PACKING for section in ("", "data.", "dataset.")},
    **{f"{section}template_name": Target("dataset.prompt_template") for section in ("", "data.", "dataset.")},
    **{f"{section}neftune_noise_alpha": Target("train.neftune_noise_alpha") for section in ("data.", "dataset.")},
    "checkpoint.most_recent_k": MOST_RECENT_K,
    "checkpointing.most_recent_k": MOST_RECENT_K,
    "most_recent_k": MOST_RECENT_K,
    "save_retain_interval": Target("checkpoint.keep_every"),
    "checkpoint.save_retain_interval": Target("checkpoint.keep_every"),
    "no_save_optim": NO_SAVE_OPTIM,
    "checkpointing.no_save_optim": NO_SAVE_OPTIM,
    # with it and use_pytorch_profiler: false Megatron-LM waits for nsys
    "profile": Target("profiling.use_pytorch_profiler", yields=True),
    **{f"profiling.{name}": entry for name, entry in PROFILING_NAMES.items()},
    "wandb": USE_WANDB,
    **{f"{section}use_wandb": USE_WANDB for section in ("", "logger.", "logging.")},
    "disable_wandb": NO_WANDB,
    "no_wandb": NO_WANDB,
    **{f"{section}wandb_run_name": WANDB_NAME for section in ("", "logger.", "logging.")},
    **{f"{section}run_name": WANDB_NAME for section in ("", "logger.", "logging.")},
    **{f"{section}report_to": REPORT_TO for section in ("", "logger.", "logging.")},
    "wandb_save_dir": Noted("runs are kept in SAVE/wandb"),
    **{
        f"{section}{name}": Target("train.num_epochs")
        for section in ("", "train.", "training.")
        for name in ("epochs", "num_train_epochs")
    },
    **{f"{section}overlap_param_gather": GATHER for section in ("", "ddp.", "parallelism.")},
    **CONTAINER_NAMES,
    **PRIMUS_OPTIONS,
}


def read_layer(tree: Located, names: Table, layer: Optional[Layer] = None) -> Layer:
    """The settings of one file's tree, put into ``layer`` where it is given."""
    layer = Layer() if layer is None else layer
    read_tree(tree, names, layer)
    peft = tree.value.get("peft")
    if peft is not None and isinstance(peft.value, dict) and peft.value and "peft.scheme" not in layer.settings:
        # in Megatron-Bridge the LoRA object itself is the choice, so 'peft: {dim: 8}' turns it on
        layer.set("peft.scheme", "lora", peft.where, "peft")
    return layer


@functools.cache
def table() -> dict[str, Entry]:
    """Every name of the flat dialect, dotted: 'training.lr', 'optimizer.lr', 'lr', ...

    A bare field name ('save_interval') is one where no two argument sections share it; these are also the short names
    of the command line.
    """
    known: dict[str, Entry] = {}
    bare: dict[str, list[str]] = {}
    for dotted in schema.fields():
        known[dotted] = Target(dotted)
        section, _, name = dotted.partition(".")
        if name:
            bare.setdefault(name, []).append(dotted)
            for alias, homes in SECTIONS.items():
                if section in homes:
                    known[f"{alias}.{name}"] = Target(dotted)
    # 'enabled', 'dim', 'split' alone say too little, but say one thing only, so they are allowed
    known.update({name: Target(homes[0]) for name, homes in bare.items() if len(homes) == 1})
    known.update(ALIASES)
    return known
