"""PeftFolder: an adapter that was trained elsewhere, read for what is really in it and checked against its model."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch

from primus_bridge.config.arguments import PeftArguments
from primus_bridge.conversion.adapter_rules import LORA_A, LORA_B, MAGNITUDE, adapter_family
from primus_bridge.conversion.adapters import ADAPTER_CONFIG, ADAPTER_FILE, PREFIX
from primus_bridge.conversion.base_model import same_base
from primus_bridge.conversion.hf_folder import dtype_name, read_json
from primus_bridge.conversion.hf_weights import HFWeights
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.conversion.peft_config import MERGE, PeftConfig
from primus_bridge.conversion.rules import expected_hf_tensors
from primus_bridge.errors import ConfigError
from primus_bridge.peft.plan import AdapterPlan
from primus_bridge.peft.targets import linears, without_adapters

PICKLED_FILE = "adapter_model.bin"
# what older releases and other trainers add: the adapter's name, and a suffix
_KEY = re.compile(r"^(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?$")
_SUFFIXES = {"lora_A": LORA_A, "lora_B": LORA_B, "lora_magnitude_vector": MAGNITUDE}


@dataclass
class PeftFolder:
    """keys: name of a tensor without PREFIX -> its key in the file; ranks: module -> rank, as the tensors have it."""

    folder: Path
    config: PeftConfig
    weights: HFWeights
    keys: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str) -> PeftFolder:
        """Read and check config and tensors by themselves. Raises ConfigError for what is missing or not supported."""
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError("no such adapter folder", where=name)
        path = folder / ADAPTER_CONFIG
        if not path.is_file():
            raise ConfigError(f"not a PEFT adapter folder: it has no {ADAPTER_CONFIG}", where=str(folder))
        config = PeftConfig.read(read_json(path), str(path))
        found = cls(folder, config, HFWeights(folder, files=[_weight_file(folder)]))
        found._sort_tensors()
        return found

    def _sort_tensors(self) -> None:
        where, config = str(next(iter(self.weights.tensors.values())).file) if self.weights.tensors else "", self.config
        if not self.weights.tensors:
            raise ConfigError("holds no tensors", where=str(self.folder))
        kinds: dict[str, set[str]] = {}
        for key in self.weights.tensors:
            match = _KEY.match(key.removeprefix(PREFIX))
            if match is None:
                raise _no_lora_tensor(key, where)
            name = match["module"] + _SUFFIXES[match["kind"]]
            if name in self.keys:
                raise ConfigError(f"tensors {self.keys[name]} and {key} are the same one", where=where)
            self.keys[name] = key
            kinds.setdefault(match["module"], set()).add(match["kind"])
        wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.use_dora else set())
        for module, found in kinds.items():
            if found != wanted:
                lacks, more = sorted(wanted - found), sorted(found - wanted)
                what = f"lacks {' and '.join(lacks)}" if lacks else f"has {more[0]}, though use_dora is false"
                raise ConfigError(f"{module} {what}: the adapter is not complete", where=where)
        for module in kinds:
            a, b = (self.weights.tensors[self.keys[module + suffix]].shape for suffix in (LORA_A, LORA_B))
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
                raise ConfigError(f"lora_A {list(a)} and lora_B {list(b)} of {module} do not fit together", where=where)
            self.ranks[module] = a[0]

    def read(self, name: str, rows: Optional[slice] = None, columns: Optional[slice] = None) -> torch.Tensor:
        """A TensorReader of the names without PREFIX."""
        return self.weights.read(self.keys[name], rows, columns)

    @property
    def modules(self) -> dict[str, tuple[int, float]]:
        """Module -> (rank, alpha)."""
        return {module: (rank, self.config.alpha_of(module)) for module, rank in self.ranks.items()}

    def arguments(self, plan: AdapterPlan) -> PeftArguments:
        """What a run with this adapter has under ``peft``."""
        rank, alpha = plan.usual
        return PeftArguments(
            scheme="lora",
            dim=rank,
            alpha=alpha,
            dropout=self.config.dropout,
            target_modules=plan.target_modules,
            use_rslora=self.config.use_rslora,
            use_dora=self.config.use_dora,
        )

    def record(self, plan: AdapterPlan) -> dict[str, Any]:
        """What a checkpoint's manifest keeps of it (Manifest.adapter)."""
        config = self.config.values | self.config.corrections(self.ranks)
        return {"modules": {name: list(value) for name, value in plan.modules.items()}, "config": config}

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds every tensor."""
        return functools.reduce(torch.promote_types, {info.dtype for info in self.weights.tensors.values()})

    @property
    def other_dtypes(self) -> dict[str, str]:
        """Tensors that have another dtype than ``dtype``."""
        found = {name: self.weights.tensors[key].dtype for name, key in self.keys.items()}
        return {name: dtype_name(dtype) for name, dtype in found.items() if dtype != self.dtype}

    def plan(self, model: HFModel, allow_other_base: bool = False) -> AdapterPlan:
        """The adapters on ``model``.

        Raises ConfigError, with tensor and shape, when they are another model's; and when the adapter names another
        base, unless that is allowed.
        """
        modules, config = self._placed(model), self.config
        lora = PeftArguments(use_rslora=config.use_rslora, use_dora=config.use_dora)
        plan = AdapterPlan.of_modules(modules, lora, model.family, model.architecture)
        self._check_shapes(plan, model)
        if not allow_other_base and not same_base(config.base, model):
            raise ConfigError(
                f"the adapter was trained on {config.base}, the model here is {model.name}; all shapes agree: when it "
                "is the same model under another name, add --allow_other_base",
                where=str(self.folder),
            )
        return plan

    def _placed(self, model: HFModel) -> Mapping[str, tuple[int, float]]:
        arch, where = model.architecture, str(self.folder)
        known = {
            module.format(layer=layer)
            for linear in linears(model.family, arch)
            for layer in linear.layers(arch)
            for module in linear.modules.values()
        }
        outside = without_adapters(model.family, arch)
        unknown = [module for module in self.ranks if module not in known]
        for module in unknown:
            kind = next((kind for template, kind in outside.items() if _is_one_of(module, template)), None)
            if kind is not None:
                raise ConfigError(f"adapts {kind} ({module}), which is not supported; {MERGE}", where=where)
        if unknown:
            raise ConfigError(
                f"is an adapter for another model{self._trained_on()}: {model.name} ({arch.model_type}, "
                f"{arch.num_layers} layers) has no {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}",
                where=where,
            )
        missing = [name for name in sorted(known) if name not in self.ranks and self.config.targets(name)]
        if missing and self.config.values.get("target_modules") is not None:
            raise ConfigError(
                f"lacks the tensors of {len(missing)} modules that target_modules names: {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}; is it an adapter for a smaller model{self._trained_on()}, "
                "or was it not saved whole?",
                where=where,
            )
        left = [name for name in self.ranks if not self.config.targets(name)]
        if left:
            raise ConfigError(
                f"holds tensors of {len(left)} modules that target_modules of {ADAPTER_CONFIG} does not name, which "
                f"peft would leave out: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}; name them there",
                where=where,
            )
        return self.modules

    def _trained_on(self) -> str:
        return f" (it was trained on {self.config.base})" if self.config.base else ""

    def _check_shapes(self, plan: AdapterPlan, model: HFModel) -> None:
        for name, shape in expected_hf_tensors(adapter_family(plan, 1).rules, plan.arch).items():
            found = self.weights.tensors[self.keys[name]]
            if found.shape != shape:
                raise ConfigError(
                    f"is an adapter for another model{self._trained_on()}: {name} is {list(found.shape)}, "
                    f"{model.name} makes it {list(shape)}",
                    where=str(found.file),
                )
            if not found.dtype.is_floating_point:
                raise ConfigError(f"{name} is {found.dtype}, no floating-point numbers", where=str(found.file))


def _is_one_of(module: str, template: str) -> bool:
    pattern = re.sub(r"\\{\w+\\}", r"\\d+", re.escape(template))
    # the experts' and the router's own names differ between releases of transformers
    return re.fullmatch(pattern, module) is not None or ".experts." in module and ".experts." in template


def _weight_file(folder: Path) -> Path:
    for name in (ADAPTER_FILE, PICKLED_FILE):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"has no {ADAPTER_FILE} (nor {PICKLED_FILE})", where=str(folder))


def _no_lora_tensor(key: str, where: str) -> ConfigError:
    if "lora_embedding" in key:
        return ConfigError(f"adapts the embeddings ({key}), which is not supported; {MERGE}", where=where)
    if key.endswith(".bias"):
        return ConfigError(f"holds a trained bias ({key}), which is not supported; {MERGE}", where=where)
    return ConfigError(
        f"holds {key}, which belongs to no LoRA adapter (modules_to_save, or embeddings that were resized?), and is "
        f"not supported; {MERGE}",
        where=where,
    )
