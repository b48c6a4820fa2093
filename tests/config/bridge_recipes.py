"""A script for an environment with megatron-bridge: what its fine-tuning recipes set, as JSON on stdout.

The model's shape is a stand-in (the recipes fetch it from the hub), and so is what a machine without CUDA lacks.

    python bridge_recipes.py NAME...        names of recipe functions; unknown ones are left out
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import json
import logging
import pkgutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bridge_stand_ins  # noqa: E402
import megatron.core.transformer  # noqa: E402, F401  its probes for Transformer Engine come before the stand-ins


class Missing(bridge_stand_ins._Finder):
    """Packages of other recipes (vision, state space), of which only the names are asked for."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        top, _, rest = name.partition(".")
        if top == "megatron":
            absent = rest.partition(".")[0] not in ("core", "bridge")
        else:
            absent = importlib.machinery.PathFinder.find_spec(top) is None
        asked = sys._getframe()
        while asked.f_back is not None and asked.f_globals.get("__name__", "").startswith(("importlib", __name__)):
            asked = asked.f_back
        wanted = absent and asked.f_globals.get("__name__", "").startswith(("megatron.", "torch.utils.tensorboard"))
        return importlib.machinery.ModuleSpec(name, Missing, is_package=True) if wanted else None


class Shape(SimpleNamespace):
    """A model provider that the recipes set the layout of."""

    seen = ""
    tensor_model_parallel_size = pipeline_model_parallel_size = context_parallel_size = 1

    @classmethod
    def from_hf_pretrained(cls, path, **unused):
        Shape.seen = path
        return cls()

    def to_megatron_provider(self, load_weights=False):
        return Shape()


LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"),
    *("expert_tensor_parallel_size", "sequence_parallel", "seq_length"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers"),
)


def facts(config) -> dict:
    """A ConfigContainer -> our argument names and values."""
    train, optimizer, scheduler = config.train, config.optimizer, config.scheduler
    out = {
        "checkpoint.hf_model_name_or_path": Shape.seen,
        "checkpoint.save_interval": config.checkpoint.save_interval,
        "dataset.packed_sequence": config.dataset.packed_sequence_specs is not None,
        "dataset.validation_split": config.dataset.val_proportion,
        "data": config.dataset.dataset_name,
        "rng.seed": config.rng.seed,
        **{f"model.{name}": getattr(config.model, name, None) for name in LAYOUT},
        **{f"train.{name}": getattr(train, name) for name in ("micro_batch_size", "global_batch_size", "train_iters")},
        **{f"train.{name}": getattr(train, name) for name in ("eval_interval", "eval_iters")},
        **{f"optimizer.{name}": getattr(optimizer, name) for name in ("lr", "min_lr", "clip_grad")},
        **{f"optimizer.adam_{name}": getattr(optimizer, f"adam_{name}") for name in ("beta1", "beta2", "eps")},
        # what Megatron's scheduler writes into the parameter groups at every step
        "optimizer.weight_decay": scheduler.end_weight_decay,
        **{f"scheduler.lr_{name}": getattr(scheduler, f"lr_{name}") for name in ("warmup_iters", "decay_iters")},
        "scheduler.lr_decay_style": scheduler.lr_decay_style,
    }
    if config.peft is not None:
        names = ("dim", "alpha", "dropout", "target_modules", "lora_A_init_method")
        out |= {f"peft.{name}": getattr(config.peft, name) for name in names}
    return out


def main(names: list[str]) -> None:
    bridge_stand_ins._AnyName.__getitem__ = lambda cls, key: cls
    bridge_stand_ins.install()
    sys.meta_path.append(Missing)
    import megatron.bridge.recipes as recipes

    found: dict[str, dict] = {}
    for entry in pkgutil.walk_packages(recipes.__path__, recipes.__name__ + "."):
        module = None if entry.ispkg else importlib.import_module(entry.name)
        for name in names:
            function = getattr(module, name, None)
            if function is None or function.__module__ != entry.name:
                continue
            module.AutoBridge = Shape
            free = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
            choices = [(peft, packed) for peft in ("lora", "dora", None) for packed in (False, True)]
            for peft, packed in choices if free else [(None if "_sft_" in name else "lora", True)]:
                config = function(peft=peft, packed_sequence=packed) if free else function()
                found[f"{name} {peft} {packed}"] = facts(config)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
