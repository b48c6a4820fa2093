"""Hugging Face folders: what is wrong with a config, a layout, a size or the disk is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from primus_bridge.conversion.families import families
from primus_bridge.conversion.hf_folder import check_space, is_own_export, parse_size, resolve
from primus_bridge.conversion.hf_weights import HFWeights
from primus_bridge.conversion.load import RandomWeights, check_tensors
from primus_bridge.conversion.model_folder import HFModel, check_layout
from primus_bridge.conversion.rules import expected_hf_tensors
from primus_bridge.conversion.safetensors_file import write_safetensors
from primus_bridge.errors import ConfigError
from tests import tiny_models
from tests.distributed.layouts import arguments_for


@pytest.fixture
def folder(tmp_path):
    return Path(tiny_models.save("llama", tmp_path / "model"))


def _edit(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        HFModel.open(str(folder), weights=True).weights()
    return str(error.value)


def test_missing_unexpected_and_wrongly_shaped_tensors_are_named(folder):
    def change(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.9.extra"] = torch.zeros(3)
        tensors["model.norm.weight"] = torch.zeros(65)
        tensors["lm_head.weight"] = torch.zeros(203, 64, dtype=torch.int32)

    _edit(folder, change)
    message = _refused(folder)
    assert "1 missing tensors: model.layers.2.mlp.up_proj.weight" in message
    assert "1 unexpected tensors: model.layers.9.extra" in message
    assert "model.norm.weight is [65], config.json makes it [64]" in message
    assert "lm_head.weight is torch.int32" in message


def test_old_rotary_buffers_and_a_tied_lm_head_are_ignored(folder):
    _edit_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight is another tensor than model.embed_tokens.weight" in _refused(folder)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _edit(folder, change)
    model = HFModel.open(str(folder), weights=True)
    ignored = check_tensors(HFWeights(folder), model.family, model.architecture)
    assert ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llamma"}, "unsupported architecture: model_type 'llamma'; supported: deepseek_v2, "),
        ({"model_type": "llamma"}, "did you mean 'llama'?"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; expected true or false"),
        ({"rope_parameters": {"rope_type": "rotor", "rope_theta": 1e4}}, "rope scaling 'rotor' is not supported"),
        (
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [1, 2]}},
            "rope scaling 'longrope' lacks short_factor, long_factor, each a list of 4 numbers",
        ),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not divisible by num_key_value_heads 3"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantised"),
        ({"vocab_size": None}, "config.json lacks vocab_size"),
    ],
)
def test_configs_that_cannot_be_held(folder, changes, message):
    _edit_config(folder, **changes)
    assert message in _refused(folder)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("100", 100)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "0GB", "-1MB", "GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_what_this_package_wrote_is_known(tmp_path):
    assert not is_own_export(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"a": (torch.float32, (2,))}, [("a", torch.ones(2))])
    assert is_own_export(tmp_path)
    save_file({"b": torch.ones(2)}, tmp_path / "other.safetensors")
    assert not is_own_export(tmp_path)


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def fetch(name, allow_patterns, ignore_patterns):
        for file in filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        return str(tmp_path / name)

    def fetched(name: str, weights: bool) -> set[str]:
        folder = resolve(name, weights)
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    small = {"config.json", "tokenizer.json"}
    pickled = {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}
    safe = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    there = [*small, *pickled, *safe, "consolidated.safetensors", "original/model.safetensors", "training_args.bin"]
    assert fetched("both", weights=False) == small
    assert fetched("both", weights=True) == small | safe
    there = [*small, *pickled, "onnx/model.safetensors", "training_args.bin"]
    assert fetched("old", weights=True) == small | pickled


def test_space_is_asked_of_the_disk_that_will_hold_it(tmp_path):
    check_space(tmp_path / "not" / "there", 1, "the export")
    with pytest.raises(ConfigError, match=r"there: the export needs 1048576.00 GiB, [\d.]+ GiB are free; give another"):
        check_space(tmp_path / "not" / "there", 2**50, "the export")


def test_layouts_that_do_not_divide(folder):
    arch = HFModel.open(str(folder), weights=False).architecture
    for model, message in (
        ({"tensor_model_parallel_size": 3}, "tensor_model_parallel_size 3 does not divide num_attention_heads 8"),
        ({"expert_model_parallel_size": 2}, "the model has no experts to share out"),
        ({"pipeline_model_parallel_size": 3}, "pipeline_model_parallel_size 3 does not divide the model's 4 layers"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            "pipeline_model_parallel_size 2 x virtual 4 does not divide",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 5},
            r"\(first 5, last None\) does not divide",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            check_layout(arch, arguments_for(model).model)
    check_layout(
        arch, arguments_for({"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 2}).model
    )


def test_random_weights_are_the_same_at_every_layout():
    config = tiny_models.build("qwen2").config.to_dict()
    family = families()["qwen2"]
    arch = family.architecture(config)
    first, second = RandomWeights(family, arch, 1), RandomWeights(family, arch, 2)
    for name in expected_hf_tensors(family.rules, arch):
        assert torch.equal(first.read(name), RandomWeights(family, arch, 1).read(name))
        if not name.endswith(("norm.weight", ".bias")):
            assert not torch.equal(first.read(name), second.read(name))
    whole = first.read("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(first.read("model.layers.0.mlp.down_proj.weight", columns=slice(8, 16)), whole[:, 8:16])
    assert whole.std().item() == pytest.approx(arch.init_std, rel=0.1)
