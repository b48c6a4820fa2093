"""BridgeArguments -> a ConfigContainer of the installed Megatron-Bridge, by its table (fields.py)."""

from __future__ import annotations

import dataclasses
import io
from contextlib import redirect_stdout
from typing import Any

from primus_bridge.bridge.adapters import adapters
from primus_bridge.bridge.engine import imported, installed
from primus_bridge.bridge.fields import Table, To, refusal
from primus_bridge.bridge.start import Start
from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError

Sections = dict[str, dict[str, Any]]


def sections_of(arguments: BridgeArguments, table: Table) -> Sections:
    """Section -> field -> value, for every argument that is a field there, and what is fixed."""
    sections: Sections = {section: {} for section in table.sections}
    values = dict(table.fixed)
    for name, entry in table.fields.items():
        if isinstance(entry, To):
            value = entry.make(arguments) if entry.make is not None else schema.get(arguments, name)
            values.update(dict.fromkeys(entry.fields, value))
    for field, value in values.items():
        section, _, key = field.partition(".")
        sections.setdefault(section, {})[key] = value
    return sections


def build_container(arguments: BridgeArguments, start: Start) -> Any:
    """The ConfigContainer of a run. Of the model only config.json is read, and no GPU is needed.

    Raises ConfigError for a model that AutoBridge does not know, or whose parts the arguments do not fit.
    """
    table = installed()
    config = imported("megatron.bridge.training.config")
    from primus_bridge.bridge.dataset import PrimusSamples

    sections = sections_of(arguments, table)
    sections["checkpoint"] |= {
        "load": str(start.load),
        "pretrained_checkpoint": str(start.pretrained) if start.pretrained is not None else None,
    }
    sections["tokenizer"]["tokenizer_model"] = arguments.tokenizer.tokenizer_model or str(start.model.folder)
    if sections["logger"].get("wandb_project"):
        sections["logger"]["wandb_save_dir"] = str(arguments.save_folder / "wandb")
    parts = {section: getattr(config, name)(**sections[section]) for section, name in table.sections.items()}
    return config.ConfigContainer(
        **parts,
        model=_model(arguments, start, sections["model"]),
        dataset=PrimusSamples(**sections["dataset"], samples=arguments.to_dict()["dataset"]),
        peft=_adapters(arguments, start, sections["peft"]),
        mixed_precision=_precision(arguments, sections["mixed_precision"]),
    )


def _model(arguments: BridgeArguments, start: Start, values: dict[str, Any]) -> Any:
    bridge = imported("megatron.bridge").AutoBridge
    try:
        # without trust_remote_code, and without the weights, which it would read when it loads them
        provider = bridge.from_hf_pretrained(str(start.model.folder)).to_megatron_provider(load_weights=False)
    except ValueError as error:
        architectures = start.model.architecture.hf_config.get("architectures")
        raise ConfigError(
            f"AutoBridge of the installed megatron-bridge cannot make this model ({architectures}); "
            "AutoBridge.list_supported_models() names those it can; engine: core runs it",
            where=start.model.name,
        ) from error
    provider.hf_model_id = str(start.model.folder)
    tensor = arguments.model.tensor_model_parallel_size
    if provider.vocab_size % tensor:
        raise refusal(
            arguments,
            "model.tensor_model_parallel_size",
            f"it does not pad the vocabulary of {provider.vocab_size}, which must divide by it",
        )
    _check_rope(start, provider)
    for name, value in values.items():
        assert hasattr(provider, name), name
        setattr(provider, name, value)
    return provider


# how megatron.core itself stretches Llama 3's positions; other numbers of config.json do not reach it
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _check_rope(start: Start, provider: Any) -> None:
    """Raises ConfigError for scaled positions that the provider has lost."""
    rope = start.model.architecture.rope
    base = provider.rotary_base  # Gemma 3 has two
    if rope is not None and isinstance(base, (int, float)) and base != rope.base:
        raise ConfigError(
            f"engine bridge reads a rope base of {base:g} where the model has {rope.base:g}: its "
            "transformers is older than the one that wrote this file; add rope_theta to it, or run engine: core",
            where=str(start.model.folder / "config.json"),
        )
    if rope is None or rope.scaling is None:
        return
    kind = rope.scaling.get("rope_type", rope.scaling.get("type"))
    if kind == "llama3" and provider.rope_scaling:
        found = {name: rope.scaling.get(name) for name in LLAMA3_ROPE}
        lost = {name: value for name, value in found.items() if value != LLAMA3_ROPE[name]}
    elif kind == "linear":
        factors = (provider.seq_len_interpolation_factor, provider.rope_scaling_factor)
        lost = {} if rope.scaling.get("factor") in factors else {"rope_type": kind}
    else:
        kinds = (provider.position_embedding_type, getattr(provider, "rope_type", None))
        lost = {} if kind in kinds else {"rope_type": kind}
    if lost:
        shown = ", ".join(f"{name} {value}" for name, value in lost.items())
        raise ConfigError(
            f"engine bridge loses the scaling of the model's positions ({shown}): run engine: core",
            where=str(start.model.folder / "config.json"),
        )


def _adapters(arguments: BridgeArguments, start: Start, values: dict[str, Any]) -> Any:
    if arguments.peft.scheme is None:
        return None
    chosen = adapters(arguments, start.model)
    modules = {"LoRA": "lora", "CanonicalLoRA": "canonical_lora", "DoRA": "dora"}
    kind = getattr(imported(f"megatron.bridge.peft.{modules[chosen.kind]}"), chosen.kind)
    alpha = values["alpha"]
    alpha = int(alpha) if alpha == int(alpha) else alpha
    return kind(**{**values, "alpha": alpha}, target_modules=chosen.target_modules)


def _precision(arguments: BridgeArguments, values: dict[str, Any]) -> Any:
    """Always an object: what it sets is set in the model, too, whose own types are the Hugging Face file's."""
    import torch

    module = imported("megatron.bridge.training.mixed_precision")
    if arguments.mixed_precision == "fp32":
        return module.MixedPrecisionConfig(
            fp32=True, params_dtype=torch.float32, pipeline_dtype=torch.float32, **values
        )
    return dataclasses.replace(module.get_mixed_precision_config(arguments.mixed_precision), **values)


def container_yaml(container: Any) -> str:
    """The container as it prints itself."""
    with redirect_stdout(io.StringIO()) as out:
        container.print_yaml()
    return out.getvalue().rstrip() + "\n"
