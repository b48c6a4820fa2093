"""adapter_config.json of PEFT: what it says of an adapter, and what of it cannot be had here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Iterable, Optional

from primus_bridge.errors import ConfigError

MERGE = "merge it into its base with peft (merge_and_unload) and convert the merged model"
# fields that change what an adapter computes, and the values at which they do not
REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
# starts that take something out of the base's weights, which the adapter then needs to stand on
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """values: the whole file; base: base_model_name_or_path."""

    values: dict[str, Any]
    where: str

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> PeftConfig:
        """Raises ConfigError for another method than LoRA, and for what LoRA cannot have here."""
        kind = values.get("peft_type")
        if str(kind).upper() != "LORA":
            raise ConfigError(f"peft_type is {kind!r}; only LORA (with rsLoRA and DoRA) can be read", where=where)
        for name, neutral in REFUSED.items():
            value = values.get(name)
            if value not in neutral:
                raise ConfigError(f"{name} is {value!r}, which is not supported; {MERGE}", where=where)
        for name, kinds, words in (
            ("r", (int,), "a whole number above 0"),
            ("lora_alpha", (int, float), "a number above 0"),
        ):
            value = values.get(name, 8)
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                raise ConfigError(f"{name} is {value!r}; expected {words}", where=where)
        for name, number in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            pattern = values.get(name) or {}
            if not isinstance(pattern, dict) or not all(_positive(value, number) for value in pattern.values()):
                raise ConfigError(f"{name} is {pattern!r}; expected module names and numbers", where=where)
            for key in pattern:
                _compiled(key, name, where)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = values.get(name)
            if value is not None and not isinstance(value, str) and not _are(str, value):
                raise ConfigError(f"{name} is {value!r}; expected a list of names or a pattern", where=where)
            if isinstance(value, str):
                _compiled(value, name, where)
        layers = values.get("layers_to_transform")
        if layers is not None and type(layers) is not int and not _are(int, layers):
            raise ConfigError(f"layers_to_transform is {layers!r}; expected layer numbers", where=where)
        dropout = values.get("lora_dropout", 0.0)
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ConfigError(f"lora_dropout is {dropout!r}; expected a fraction", where=where)
        return cls(values, where)

    @property
    def base(self) -> Optional[str]:
        name = self.values.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def use_rslora(self) -> bool:
        return self.values.get("use_rslora") is True

    @property
    def use_dora(self) -> bool:
        return self.values.get("use_dora") is True

    @property
    def dropout(self) -> float:
        return float(self.values.get("lora_dropout", 0.0))

    @property
    def notes(self) -> list[str]:
        """What a user should know before going on."""
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
            return [
                f"{self.where}: init_lora_weights is {start!r}, which takes part of the base's weights away: the "
                "adapter is right only on the base as that left it (peft: path_initial_model_for_weight_conversion "
                "makes it an ordinary one)"
            ]
        return []

    def rank_of(self, module: str) -> int:
        """The rank that PEFT would give a module."""
        return _by_pattern(self.values.get("rank_pattern") or {}, module, self.values.get("r", 8))

    def alpha_of(self, module: str) -> float:
        return float(_by_pattern(self.values.get("alpha_pattern") or {}, module, self.values.get("lora_alpha", 8)))

    def corrections(self, ranks: dict[str, int]) -> dict[str, Any]:
        """Fields with which the file says of every module the rank that its tensors have; none where it does."""
        if all(self.rank_of(module) == rank for module, rank in ranks.items()):
            return {}
        usual = self.values.get("r", 8)
        return {"rank_pattern": {re.escape(module): rank for module, rank in ranks.items() if rank != usual}}

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on a linear of the decoder's layers.

        As peft's check_target_module_exists (0.21), with all-linear, which its files name only in old releases.
        """
        targets, excluded = self.values.get("target_modules"), self.values.get("exclude_modules") or []
        if isinstance(excluded, str):
            if re.fullmatch(excluded, module):
                return False
        elif _ends_with(module, excluded):
            return False
        if targets is None:
            return True  # peft's own choice for the model_type: what is there counts
        if isinstance(targets, str):
            return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
        return _ends_with(module, targets) and (module in targets or self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.values.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if match:
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False


def _by_pattern(pattern: dict[str, Any], module: str, usual: Any) -> Any:
    """As peft's get_pattern_key."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), usual)


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith("." + name) for name in names)


def _positive(value: Any, kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _compiled(pattern: str, name: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{name}: {pattern!r} is no regular expression: {error}", where=where) from None
