"""The defaults of Megatron-Bridge's fine-tuning recipes, which Primus's model presets name: ``recipe`` and ``flavor``.

A row is what such a function sets when it is called with nothing but ``peft`` and ``packed_sequence``. Names ending in
``_finetune_config`` are those of the Megatron-Bridge that Primus v26.5 pins (0.3.0rc0); those ending in ``_sft_config``
and ``_peft_config`` are their successors in 0.3.1. tests/config/test_flavors.py compares the table with the functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from primus_bridge.config.follow import REPLACES, replaces
from primus_bridge.config.merge import Layer
from primus_bridge.errors import ConfigError, did_you_mean

FUSED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
SQUAD = "rajpurkar/squad"
DECAY = 0.033
"""Their optimizer says 0.1, but their scheduler goes from 0.033 to 0.033 and writes that into every step."""

SHARED: dict[str, Any] = {
    "mixed_precision": "bf16_mixed",
    "train.micro_batch_size": 1,
    "optimizer.min_lr": 0.0,
    "optimizer.adam_beta1": 0.9,
    "optimizer.clip_grad": 1.0,
    "optimizer.weight_decay": DECAY,
    "scheduler.lr_decay_style": "cosine",
    "rng.seed": 5678,
    "dataset.data_path": SQUAD,
    "dataset.validation_split": 0.1,
}


@dataclass(frozen=True)
class Family:
    """What the flavors of one recipe file share. Pairs are (not packed, packed)."""

    recipe: str
    train_iters: int
    lr_warmup_iters: int
    lr_decay_iters: Optional[int]
    adam_beta2: float
    evaluate: tuple[int, int]
    """eval_interval, eval_iters"""
    save_interval: int
    seq_length: tuple[int, int]
    global_batch_size: tuple[int, int]


QWEN3 = Family("qwen.qwen3", 1000, 50, None, 0.98, (30, 32), 50, (2048, 2048), (128, 8))
LLAMA3 = Family("llama.llama3", 1000, 50, None, 0.98, (30, 32), 50, (2048, 4096), (128, 8))
QWEN2 = Family("qwen.qwen2", 100, 10, 100, 0.95, (50, 10), 100, (4096, 2048), (128, 128))
QWEN3_MOE = Family("qwen.qwen3_moe", 100, 10, 100, 0.95, (50, 10), 100, (4096, 2048), (32, 32))
GEMMA2 = Family("gemma.gemma2", 100, 10, 100, 0.95, (50, 10), 100, (4096, 2048), (128, 128))
GEMMA3 = Family("gemma.gemma3", 100, 10, 100, 0.95, (50, 10), 100, (2048, 4096), (32, 32))


@dataclass(frozen=True)
class Flavor:
    family: Family
    hf_path: str
    full: tuple[int, int]
    """Tensor- and pipeline-parallel ranks of full fine-tuning."""
    lora: tuple[int, int] = (1, 1)
    """The same with LoRA or DoRA."""
    adapter: Optional[tuple[int, int]] = None
    """dim, alpha; None: LoRA 32, 32 and DoRA 32, 64."""
    targets: tuple[str, ...] = FUSED
    also: dict[str, Any] = field(default_factory=dict)
    also_full: dict[str, Any] = field(default_factory=dict)
    also_lora: dict[str, Any] = field(default_factory=dict)


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1, "sequence_parallel": True}


def _ends(layers: int) -> dict[str, int]:
    """The first and the last stage have a layer less, for the embedding and the loss."""
    return {"num_layers_in_first_pipeline_stage": layers, "num_layers_in_last_pipeline_stage": layers}


FLAVORS: dict[str, Flavor] = {
    "qwen3_600m": Flavor(QWEN3, "Qwen/Qwen3-0.6B", full=(1, 1)),
    "qwen3_1p7b": Flavor(QWEN3, "Qwen/Qwen3-1.7B", full=(1, 1)),
    "qwen3_4b": Flavor(QWEN3, "Qwen/Qwen3-4B", full=(2, 1)),
    "qwen3_8b": Flavor(QWEN3, "Qwen/Qwen3-8B", full=(4, 1)),
    "qwen3_14b": Flavor(QWEN3, "Qwen/Qwen3-14B", full=(8, 1)),
    "qwen3_32b": Flavor(QWEN3, "Qwen/Qwen3-32B", full=(8, 2), also=RECOMPUTE),
    "qwen3_30b_a3b": Flavor(
        QWEN3_MOE, "Qwen/Qwen3-30B-A3B", (4, 2), (4, 1), adapter=(8, 16), targets=FUSED[:2], also=EXPERTS
    ),
    "qwen3_235b_a22b": Flavor(
        QWEN3_MOE,
        "Qwen/Qwen3-235B-A22B",
        full=(4, 16),
        lora=(4, 4),
        adapter=(8, 16),
        targets=FUSED[:2],
        also=EXPERTS,
        also_full=_ends(5),
        also_lora=_ends(23),
    ),
    "qwen2_500m": Flavor(QWEN2, "Qwen/Qwen2-0.5B", full=(1, 1)),
    "qwen2_1p5b": Flavor(QWEN2, "Qwen/Qwen2-1.5B", full=(1, 1)),
    "qwen2_7b": Flavor(QWEN2, "Qwen/Qwen2-7B", full=(2, 1)),
    "qwen2_72b": Flavor(QWEN2, "Qwen/Qwen2-72B", full=(8, 4), lora=(8, 1)),
    "qwen25_500m": Flavor(QWEN2, "Qwen/Qwen2.5-0.5B", full=(1, 1)),
    "qwen25_1p5b": Flavor(QWEN2, "Qwen/Qwen2.5-1.5B", full=(1, 1)),
    "qwen25_7b": Flavor(QWEN2, "Qwen/Qwen2.5-7B", full=(2, 1)),
    "qwen25_14b": Flavor(QWEN2, "Qwen/Qwen2.5-14B", full=(4, 1)),
    "qwen25_32b": Flavor(QWEN2, "Qwen/Qwen2.5-32B", full=(8, 2), lora=(8, 1)),
    "qwen25_72b": Flavor(QWEN2, "Qwen/Qwen2.5-72B", full=(8, 4), lora=(8, 1)),
    "llama3_8b": Flavor(LLAMA3, "meta-llama/Meta-Llama-3-8B", full=(2, 1), adapter=(8, 16)),
    "llama3_70b": Flavor(LLAMA3, "meta-llama/Meta-Llama-3-70B", full=(8, 4), lora=(8, 1), adapter=(16, 32)),
    "llama31_8b": Flavor(LLAMA3, "meta-llama/Meta-Llama-3.1-8B", full=(2, 1), adapter=(8, 16)),
    "llama31_70b": Flavor(LLAMA3, "meta-llama/Meta-Llama-3.1-70B", full=(8, 4), lora=(8, 1), adapter=(16, 32)),
    "llama32_1b": Flavor(LLAMA3, "meta-llama/Llama-3.2-1B", full=(1, 1)),
    "llama32_3b": Flavor(LLAMA3, "meta-llama/Llama-3.2-3B", full=(1, 1)),
    "gemma2_2b": Flavor(GEMMA2, "google/gemma-2-2b", full=(1, 1)),
    "gemma2_9b": Flavor(GEMMA2, "google/gemma-2-9b", full=(4, 1)),
    "gemma2_27b": Flavor(GEMMA2, "google/gemma-2-27b", full=(8, 2), lora=(4, 1)),
    "gemma3_1b": Flavor(GEMMA3, "google/gemma-3-1b-pt", full=(1, 1), adapter=(8, 16)),
}
ENDINGS = ("_finetune_config", "_sft_config", "_peft_config")
PRETRAIN = "_pretrain_config"

STATE_SPACE = "its layers are state-space ones (Mamba), which this version has none of"
REFUSED = {
    "mamba": STATE_SPACE,
    "zebra_llama": STATE_SPACE,
    "nemotronh": STATE_SPACE,
    "qwen3_next": "its layers are gated delta nets, which this version has none of",
    "mlperf_llama2_70b": "it trains in MXFP4, which is not in this version; LoRA in bf16 is recipe llama2_70b_lora",
}
"""A part of a recipe's or a flavor's name -> why no table can give its defaults."""

BALANCING = (
    "Megatron-Bridge adds a balancing loss to the router there (moe_aux_loss_coeff 1e-3), and this version has none: "
    "the router is kept as it was trained"
)

# of a flavor's defaults: a user's own key takes their place, where of a user's own values it would be too much
YIELDS = {
    **REPLACES,
    "dataset.streaming": ("dataset.validation_split",),
    "train.num_epochs": ("train.train_iters", "scheduler.lr_decay_iters"),
}


def check_trainable(recipe: Optional[str], flavor: Optional[str], where: str) -> None:
    """Raises ConfigError for a model that cannot be trained here at any stage, with the reason."""
    for part, reason in REFUSED.items():
        if part in f"{recipe}.{flavor}":
            name = f"flavor '{flavor}'" if flavor is not None else f"recipe '{recipe}'"
            raise ConfigError(f"{name} cannot be used: {reason}", where=where)


def is_flavor(name: str) -> bool:
    """Whether a name is one of a flavor, known or not."""
    return name.endswith((*ENDINGS, PRETRAIN))


def of_bridge(recipe: str) -> bool:
    """Whether a recipe's name is that of a file of Megatron-Bridge's functions: 'qwen.qwen3'."""
    folders = {row.family.recipe.partition(".")[0] for row in FLAVORS.values()}
    known = recipe.partition(".")[0] in folders or any(part in recipe for part in REFUSED)
    return known and "." in recipe and "/" not in recipe and not recipe.endswith((".yaml", ".yml"))


class FlavorLayer(Layer):
    """The settings of a flavor: below all others, and read as Primus reads its presets."""


def flavor_layer(recipe: Optional[str], flavor: str, where: str, layers: list[Layer]) -> FlavorLayer:
    """The defaults of a flavor, for the choice of peft and packing that ``layers`` (which come above) make.

    Raises ConfigError for a flavor without a table, by its name.
    """
    name, ending = next(((flavor.removesuffix(end), end) for end in ENDINGS if flavor.endswith(end)), (flavor, ""))
    row = FLAVORS.get(name)
    if row is None or not ending:
        known = [known + end for known in FLAVORS for end in ENDINGS]
        raise ConfigError(
            f"there is no table of the defaults of flavor '{flavor}'{did_you_mean(flavor, known)}; there is one for "
            f"{', '.join(FLAVORS)}, each with {', '.join(ENDINGS)}: use one of them, or a recipe of this package "
            "(recipe: NAME, without flavor)",
            where=where,
        )
    if recipe is not None and recipe != row.family.recipe:
        raise ConfigError(f"flavor '{flavor}' is of recipe '{row.family.recipe}', not of '{recipe}'", where=where)
    settings = {argument: setting for layer in layers for argument, setting in layer.settings.items()}
    given = {argument: setting.value for argument, setting in settings.items()}
    packed = given.get("dataset.packed_sequence", ending != "_finetune_config")
    scheme = given.get("peft.scheme", None if ending == "_sft_config" else "lora")
    values = defaults(row, scheme, bool(given.get("peft.use_dora")), packed, adam_eps(ending))
    data = given.get("dataset.data_path", SQUAD)
    if _is_squad(data) and "dataset.sources" not in given:
        # their processor is SQuAD's; rows of another shape, which it would not read, get the template of their format
        values["dataset.prompt_template"] = "squad"
    for own, its in YIELDS.items():
        unchanged = own in values and given.get(own) == values[own]
        if own in given and replaces(own, given[own]) and not unchanged:
            for argument in its:
                values.pop(argument, None)
    layer = FlavorLayer()
    if row.family is QWEN3_MOE:
        layer.notes.append(f"{where}: flavor '{flavor}': {BALANCING}")
    decay = settings.get("optimizer.weight_decay")
    if decay is not None and decay.written.rpartition(".")[2] == "weight_decay" and decay.value != DECAY:
        layer.notes.append(
            f"{decay.source}: weight decay is {decay.value:g} here; Primus itself stays at {DECAY}, which flavor "
            f"'{flavor}' writes as scheduler.start_weight_decay and end_weight_decay"
        )
    for argument, value in values.items():
        layer.set(argument, value, f"flavor {flavor}", argument.rpartition(".")[2])
    return layer


def adam_eps(ending: str) -> float:
    """Of a name with this ending: the two generations of these functions differ in it, and in packing, only."""
    return 1e-5 if ending == "_finetune_config" else 1e-8


def defaults(row: Flavor, scheme: Optional[str], dora: bool, packed: bool, eps: float) -> dict[str, Any]:
    """Argument -> value of one row. scheme None: full fine-tuning."""
    family = row.family
    tensor, pipeline = row.full if scheme is None else row.lora
    model = {**row.also, **(row.also_full if scheme is None else row.also_lora)}
    values = {
        **SHARED,
        "checkpoint.hf_model_name_or_path": row.hf_path,
        "checkpoint.save_interval": family.save_interval,
        "dataset.packed_sequence": packed,
        "model.seq_length": family.seq_length[packed],
        "model.tensor_model_parallel_size": tensor,
        "model.pipeline_model_parallel_size": pipeline,
        **{f"model.{name}": value for name, value in model.items()},
        "train.global_batch_size": family.global_batch_size[packed],
        "train.train_iters": family.train_iters,
        "train.eval_interval": family.evaluate[0],
        "train.eval_iters": family.evaluate[1],
        "optimizer.lr": 5e-6 if scheme is None else 1e-4,
        "optimizer.adam_beta2": family.adam_beta2,
        "optimizer.adam_eps": eps,
        "scheduler.lr_warmup_iters": family.lr_warmup_iters,
        "scheduler.lr_decay_iters": family.lr_decay_iters,
    }
    if scheme is not None:
        dim, alpha = row.adapter or (32, 64 if dora else 32)
        values |= {
            "peft.scheme": "lora",
            "peft.dim": dim,
            "peft.alpha": float(alpha),
            "peft.dropout": 0.0,
            "peft.target_modules": list(row.targets),
            "peft.lora_A_init_method": "xavier",
        }
    return values


def _is_squad(path: Any) -> bool:
    """'rajpurkar/squad', 'squad', or a folder of that name."""
    return isinstance(path, str) and path.rstrip("/").rpartition("/")[2].partition(":")[0] in ("squad", "squad_v2")
