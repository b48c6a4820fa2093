"""Hugging Face folders: what is wrong is named, slices read only their bytes, files are written as a stream."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from primus_bridge.conversion.families import families, family_of
from primus_bridge.conversion.hf_folder import HFWeights, parse_size, read_config, read_header, write_safetensors
from primus_bridge.conversion.load import RandomWeights, check_tensors
from primus_bridge.conversion.model_folder import HFModel, check_layout
from primus_bridge.conversion.rules import expected_hf_tensors
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
    _edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    model = HFModel.open(str(folder), weights=True)
    ignored = check_tensors(HFWeights(folder), model.family, model.architecture)
    assert ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]


def test_truncated_and_foreign_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "truncated: tensor" in _refused(folder) and "model.safetensors" in _refused(folder)
    path.write_bytes(whole[:5])
    assert "truncated or not a safetensors file (5 bytes)" in _refused(folder)
    path.write_bytes(struct.pack("<Q", 10) + b"x" * 40)
    assert "its header is not JSON" in _refused(folder)
    path.unlink()
    assert "has no weights" in _refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle, which is not read" in _refused(folder)


def test_an_index_stays_inside_its_folder(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    assert "names a file outside the folder" in _refused(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert "names files that are not there: model-2.safetensors" in _refused(folder)


def test_a_tensor_in_two_files(folder):
    save_file({"model.norm.weight": torch.ones(64)}, folder / "other.safetensors")
    assert "tensor model.norm.weight is also in model.safetensors" in _refused(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llamma"}, "unsupported architecture: model_type 'llamma'; supported: llama, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias and mlp_bias are not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling 'longrope' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantised"),
        ({"vocab_size": None}, "config.json lacks vocab_size"),
    ],
)
def test_configs_that_cannot_be_held(folder, changes, message):
    _edit_config(folder, **changes)
    assert message in _refused(folder)


def test_both_spellings_of_rope(folder):
    config = read_config(folder)
    config.pop("rope_parameters", None)
    old = config | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    new = config | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    first, second = (family_of(c, "").architecture(c) for c in (old, new))
    assert (first.rotary_base, first.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})
    assert (second.rotary_base, second.rope_scaling) == (first.rotary_base, first.rope_scaling)


def test_slices_and_streamed_files(tmp_path):
    values = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.randn(0, 4)}
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in values.items()}
    write_safetensors(tmp_path / "model.safetensors", entries, iter(values.items()))
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, values[name])
    assert set(read_header(tmp_path / "model.safetensors")) == set(values)
    weights = HFWeights(tmp_path)
    assert torch.equal(weights.read("a", rows=slice(2, 5)), values["a"][2:5])
    assert torch.equal(weights.read("a", columns=slice(1, 3)), values["a"][:, 1:3])
    assert torch.equal(weights.read("b"), values["b"])
    assert weights.dtype is torch.float32


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("100", 100)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "0GB", "-1MB", "GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_layouts_that_do_not_divide(folder):
    arch = HFModel.open(str(folder), weights=False).architecture
    for model, message in (
        ({"tensor_model_parallel_size": 3}, "tensor_model_parallel_size 3 does not divide num_attention_heads 8"),
        ({"tensor_model_parallel_size": 8}, "does not divide num_key_value_heads 4"),
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
