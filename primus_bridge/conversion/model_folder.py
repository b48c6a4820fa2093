"""HFModel: a Hugging Face model folder as one object: where it lies, what it is, how it converts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.conversion.families import Family, family_of
from primus_bridge.conversion.hf_folder import is_folder, read_config, resolve
from primus_bridge.conversion.rules import expected_hf_tensors
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from primus_bridge.conversion.hf_weights import HFWeights


@dataclass(frozen=True)
class HFModel:
    """folder: config.json, tokenizer and perhaps weights; name: what the user called it (a path or a hub id)."""

    name: str
    folder: Path
    family: Family
    architecture: Architecture

    @classmethod
    def open(cls, name: str, weights: bool) -> HFModel:
        """Find (or fetch) a model and read its config. Raises ConfigError for what is missing or not supported."""
        return cls.at(resolve(name, weights), name)

    @classmethod
    def at(cls, folder: Path, name: str) -> HFModel:
        config = read_config(folder)
        family = family_of(config, str(folder / "config.json"))
        try:
            architecture = family.architecture(config)
        except ConfigError as error:
            raise ConfigError(error.message, where=str(folder / "config.json")) from None
        return cls(name, folder, family, architecture)

    def weights(self) -> HFWeights:
        """The folder's tensors, compared with what the architecture needs. Raises ConfigError that names them."""
        from primus_bridge.conversion.hf_weights import HFWeights
        from primus_bridge.conversion.load import check_tensors

        weights = HFWeights(self.folder)
        if self.family.optional_prefix:
            expected = expected_hf_tensors(self.family.rules, self.architecture)
            weights.complete_names(self.family.optional_prefix, expected)
        check_tensors(weights, self.family, self.architecture)
        return weights

    def left_out(self, weights: HFWeights) -> list[str]:
        """A line that names tensors of the folder which this decoder has no place for, or nothing."""
        names = [name for name in weights.tensors if self.family.ignored(name, self.architecture)]
        if not names:
            return []
        return [f"left out {len(names)} tensors beyond the decoder, as transformers does: {names[0]}, ..."]


def base_name(name: str) -> str:
    """How a model is named in what is written: a folder by its whole path, so that it is found from anywhere."""
    return str(Path(name).expanduser().absolute()) if is_folder(name) else name


def check_layout(arch: Architecture, model) -> None:
    """Raises ConfigError when a layout (ModelArguments) does not divide the heads, the MLP or the layers."""
    tensor = model.tensor_model_parallel_size
    sizes = [("num_attention_heads", arch.num_attention_heads)]
    if arch.moe is None or not all(arch.moe.layers):
        sizes.append(("intermediate_size", arch.ffn_hidden_size))
    if arch.moe is not None and arch.moe.shared_ffn_hidden_size:
        sizes.append(("size of the shared experts", arch.moe.shared_ffn_hidden_size))
    groups = arch.num_query_groups
    if tensor < groups or arch.qk_norm == "all":
        sizes.append(("num_key_value_heads", groups))
    for what, size in sizes:
        if size % tensor:
            raise ConfigError(f"tensor_model_parallel_size {tensor} does not divide {what} {size} of the model")
    if tensor > groups and tensor % groups:
        raise ConfigError(
            f"tensor_model_parallel_size {tensor} is not a multiple of num_key_value_heads {groups} of the model"
        )
    _check_experts(arch, model)
    layers, stages = arch.num_layers, model.pipeline_model_parallel_size
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    rest, rest_stages = layers - (first or 0) - (last or 0), stages - (first is not None) - (last is not None)
    chunks = rest_stages * (model.virtual_pipeline_model_parallel_size or 1)
    if rest < 0 or (rest_stages == 0 and rest) or (rest_stages and (rest % chunks or not rest)):
        layout = f"pipeline_model_parallel_size {stages}"
        if model.virtual_pipeline_model_parallel_size:
            layout += f" x virtual {model.virtual_pipeline_model_parallel_size}"
        if first or last:
            layout += f" (first {first}, last {last})"
        raise ConfigError(
            f"{layout} does not divide the model's {layers} layers; for uneven stages set "
            "num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage or both"
        )


def _check_experts(arch: Architecture, model) -> None:
    ranks, tensor = model.expert_model_parallel_size, model.expert_tensor_parallel_size
    if arch.moe is None:
        if ranks > 1 or tensor:
            raise ConfigError("expert_model_parallel_size: the model has no experts to share out; leave it out")
        return
    if arch.moe.num_experts % ranks:
        raise ConfigError(
            f"expert_model_parallel_size {ranks} does not divide the model's {arch.moe.num_experts} experts"
        )
    tensor = tensor or model.tensor_model_parallel_size
    if arch.moe.ffn_hidden_size % tensor:
        raise ConfigError(
            f"expert_tensor_parallel_size {tensor} does not divide the experts' size {arch.moe.ffn_hidden_size}"
        )
