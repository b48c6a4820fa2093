"""Hugging Face -> Megatron checkpoint -> Hugging Face through the command's own functions, in at one layout and out at
another; and a run of experts resumed at another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from primus_bridge.conversion.convert import export_hf, import_hf
from primus_bridge.conversion.model_folder import HFModel
from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.distributed.rank_functions import save_and_resume
from tests.distributed.test_round_trip import tensors

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
ETP = "expert_tensor_parallel_size"
# one of each kind of layer that a checkpoint holds
CASES = {
    "llama": ({TP: 2}, {PP: 2}),
    "gemma2": ({PP: 2}, {TP: 2}),
    "gpt2": ({TP: 2}, {}),
    "olmo2": ({TP: 2}, {PP: 2}),
    "glm4": ({TP: 2}, {}),
    "falcon, one head": ({TP: 2}, {PP: 2}),
    "qwen2 moe": ({EP: 2}, {PP: 2}),
    "mixtral": ({TP: 2, EP: 2, ETP: 1}, {TP: 2}),
    "deepseek_v3": ({TP: 2}, {EP: 2}),
}


def _ranks(layout: dict[str, int]) -> int:
    return 2 if layout else 1


def there_and_back(folder: Path, work: Path, into: dict[str, int], out: dict[str, int]) -> Path:
    run_distributed(import_hf, _ranks(into), str(folder), str(work / "ckpt"), into)
    options = (False, False, None, "20KB", None, out)
    run_distributed(export_hf, _ranks(out), str(work / "ckpt"), str(work / "out"), *options)
    return work / "out"


def same(folder: Path, exported: Path) -> None:
    want, got = tensors(folder), tensors(exported)
    assert set(want) == set(got)
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("case", CASES)
def test_in_at_one_layout_and_out_at_another(case, tmp_path):
    folder = Path(family_models.save(case, tmp_path / "hf", dtype=torch.bfloat16))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    exported = there_and_back(folder, tmp_path, *CASES[case])
    same(folder, exported)
    assert (exported / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((exported / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert len(list(exported.glob("*.safetensors"))) > 2


def test_tensors_of_several_dtypes_come_back_in_their_own(tmp_path):
    folder = Path(family_models.save("llama", tmp_path / "hf", dtype=torch.bfloat16))
    weights = load_file(folder / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    weights[norm] = weights[norm].float() + 1e-6  # more digits than bf16 has
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    same(folder, there_and_back(folder, tmp_path, {}, {}))


def test_gpt2_without_the_prefix_that_its_first_release_lacks(tmp_path):
    folder = Path(family_models.save("gpt2", tmp_path / "hf"))
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # the causal mask, which it holds as a buffer
    (folder / "model.safetensors").unlink()
    torch.save(bare, folder / "pytorch_model.bin")  # and as a pickle
    exported = there_and_back(folder, tmp_path, {TP: 2}, {})
    got = tensors(exported)
    assert set(got) == set(weights)
    assert all(torch.equal(got[name], value) for name, value in weights.items())


def test_layers_beyond_the_decoder_are_left_out_aloud(tmp_path):
    folder = Path(family_models.save("deepseek_v3", tmp_path / "hf", num_nextn_predict_layers=1))
    weights = load_file(folder / "model.safetensors")
    extra = {"model.layers.4.eh_proj.weight": torch.ones(64, 128)}
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    model = HFModel.open(str(folder), weights=True)
    assert model.left_out(model.weights()) == [
        "left out 1 tensors beyond the decoder, as transformers does: model.layers.4.eh_proj.weight, ..."
    ]
    assert set(tensors(there_and_back(folder, tmp_path, {}, {}))) == set(weights)


@pytest.mark.parametrize(
    ("case", "changes", "before", "after"),
    [
        ("mixtral", {}, {EP: 2}, {}),
        # the first stage has no experts
        ("deepseek_v3", {"first_k_dense_replace": 2}, {}, {PP: 2, EP: 2}),
    ],
)
def test_a_run_of_experts_resumes_at_another_layout(case, changes, before, after, tmp_path):
    folder = family_models.save(case, tmp_path / "hf", **changes)

    def job(layout: dict, first: int, last: int, load: str | None):
        arguments = arguments_for(layout, train={"train_iters": 4}, optimizer={"lr": 1e-3})
        return [(arguments, str(tmp_path / "run"), first, last, load)]

    def ranks(layout: dict) -> int:
        return layout.get(PP, 1) * layout.get(EP, 1)

    run_distributed(save_and_resume, ranks(before), folder, job(before, 0, 2, None))
    resumed = run_distributed(save_and_resume, ranks(after), folder, job(after, 2, 4, str(tmp_path / "run")))[0][0]
    whole = run_distributed(
        save_and_resume, 1, folder, [(job({}, 0, 4, None)[0][0], str(tmp_path / "whole"), 0, 4, None)]
    )[0][0]
    for ours, want in zip(resumed["steps"], whole["steps"][2:], strict=True):
        assert ours["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
