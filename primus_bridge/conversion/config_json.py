"""Reading config.json: numbers, rope parameters and windows, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import math
from typing import Any, Optional, Sequence

from primus_bridge.conversion.architecture import Architecture, Rope
from primus_bridge.errors import ConfigError

# kind -> the numbers, and the lists of numbers, that it needs
ROPE_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor",), ()),
    "longrope": ((), ("short_factor", "long_factor")),
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def number(config: dict[str, Any], name: str, default: Any = None, whole: bool = False) -> Any:
    """A positive number of config.json, or ``default`` where it is absent or null.

    Raises ConfigError for anything else, and for an absent one without a default.
    """
    value = config.get(name)
    if value is None:
        value = default
    kinds = (int,) if whole else (int, float)
    if value is None:
        raise ConfigError(f"config.json lacks {name}")
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value!r}; expected a positive {'whole ' if whole else ''}number")
    return value


def optional_number(config: dict[str, Any], name: str, default: Any = None, whole: bool = False) -> Any:
    """As ``number``, and None where it is null; ``default`` only where it is absent."""
    if name in config and config[name] is None:
        return None
    if name not in config and default is None:
        return None
    return number(config, name, default, whole)


def count(config: dict[str, Any], name: str) -> int:
    """A whole number of config.json that may be 0, which it is where it is absent or null."""
    return number(config, name, whole=True) if config.get(name) else 0


def head_size(config: dict[str, Any]) -> int:
    """head_dim, or hidden_size / num_attention_heads."""
    hidden, heads = (number(config, name, whole=True) for name in ("hidden_size", "num_attention_heads"))
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    return number(config, "head_dim", hidden // heads, whole=True)


def flag(config: dict[str, Any], name: str, default: bool) -> bool:
    """true or false of config.json; absent or null: ``default``. Raises ConfigError for anything else."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected true or false")
    return value


def one_of(config: dict[str, Any], name: str, known: Sequence[str], default: str) -> str:
    """A word of config.json. Raises ConfigError for one that is not among ``known``."""
    value = config.get(name) or default
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; supported for {config['model_type']}: {', '.join(known)}")
    return value


def activation(config: dict[str, Any], *names: str, default: str = "silu") -> Any:
    """The MLP's activation under the first of ``names`` that is set."""
    value = next((config[name] for name in names if config.get(name)), default)
    if value not in ACTIVATIONS:
        raise ConfigError(f"{names[0]} {value!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of an object of config.json; absent or null: empty. Raises ConfigError for anything else."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {value!r}; expected an object")
    return dict(value)


def rope_of(
    config: dict[str, Any],
    head_dim: int,
    *,
    base: float = 10000.0,
    partial: float = 1.0,
    interleaved: bool = False,
    parameters: Optional[dict[str, Any]] = None,
) -> Rope:
    """Rotary positions from either spelling: transformers 4's rope_theta + rope_scaling, or 5's rope_parameters.

    base, partial: the family's defaults. parameters: the part of a nested rope_parameters to read instead.
    Raises ConfigError for a kind that is not in ROPE_KINDS or lacks a parameter.
    """
    scaling = dict(parameters) if parameters is not None else {}
    if parameters is None:
        scaling = section(config, "rope_parameters") or section(config, "rope_scaling")
    base = number({"rope_theta": scaling.pop("rope_theta", config.get("rope_theta"))}, "rope_theta", base)
    share = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    share = number({"partial_rotary_factor": share}, "partial_rotary_factor", partial)
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope scaling '{kind}' is not supported; supported: {', '.join(ROPE_KINDS)}")
    numbers, lists = ROPE_KINDS[kind]
    dim = int(head_dim * share)
    missing = [name for name in numbers if not isinstance(scaling.get(name), (int, float))]
    missing += [name for name in lists if not _is_list(scaling.get(name), dim // 2)]
    if missing:
        what = f", each a list of {dim // 2} numbers" if lists else ""
        raise ConfigError(f"rope scaling '{kind}' lacks {', '.join(missing)}{what}")
    positions = number(config, "max_position_embeddings", 2048, whole=True)
    if kind in ("yarn", "longrope"):
        original = config.get("original_max_position_embeddings") or positions
        scaling.setdefault("original_max_position_embeddings", original)
    return Rope(float(base), dim, positions, {"rope_type": kind, **scaling} if kind != "default" else None, interleaved)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(x, (int, float)) for x in value)


def layer_windows(config: dict[str, Any], layers: int, window: Optional[int], slides) -> tuple[Optional[int], ...]:
    """A layer's window or None, from layer_types, or where config.json has none from ``slides(layer)``."""
    types = config.get("layer_types")
    if types is None:
        return tuple(window if window and slides(layer) else None for layer in range(layers))
    kinds = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
        raise ConfigError(f"layer_types is {types!r}; expected {layers} of {', '.join(kinds)}")
    if kinds[0] in types and not window:
        raise ConfigError("layer_types has sliding_attention, but there is no sliding_window")
    return tuple(window if kind == kinds[0] else None for kind in types)


def decoder_architecture(config: dict[str, Any], **different: Any) -> Architecture:
    """The Llama-shaped fields of config.json; ``different``: what a family reads in its own way.

    Raises ConfigError for a missing field or an option that no rule covers.
    """
    hidden, heads = (number(config, name, whole=True) for name in ("hidden_size", "num_attention_heads"))
    head_dim = different.get("kv_channels") or head_size(config)
    groups = different.get("num_query_groups") or number(config, "num_key_value_heads", heads, whole=True)
    if heads % groups:
        raise ConfigError(f"num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")
    fields: dict[str, Any] = dict(
        model_type=config["model_type"],
        num_layers=number(config, "num_hidden_layers", whole=True),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        vocab_size=number(config, "vocab_size", whole=True),
        max_position_embeddings=number(config, "max_position_embeddings", 2048, whole=True),
        tied_embeddings=flag(config, "tie_word_embeddings", False),
        qkv_bias=flag(config, "attention_bias", False),
        attention_out_bias=flag(config, "attention_bias", False),
        mlp_bias=flag(config, "mlp_bias", False),
        init_std=number(config, "initializer_range", 0.02),
        hf_config=config,
    )
    if "ffn_hidden_size" not in different:
        fields["ffn_hidden_size"] = number(config, "intermediate_size", whole=True)
    if "activation" not in different:
        fields["activation"] = activation(config, "hidden_act")
    if "layernorm_epsilon" not in different:
        fields["layernorm_epsilon"] = number(config, "rms_norm_eps", 1e-6)
    if "rope" not in different:
        fields["rope"] = rope_of(config, head_dim)
    return Architecture(**(fields | different))
