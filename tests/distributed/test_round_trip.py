"""HF -> Megatron -> HF: equal in every byte of every tensor, at each layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests import family_models, tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.distributed.rank_functions import round_trip

TP, PP, VP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
LAYOUTS = {
    1: [{}],
    2: [{TP: 2}, {PP: 2}, {PP: 2, VP: 2}, {}, {PP: 2, "num_layers_in_first_pipeline_stage": 3}],
    4: [{TP: 2, PP: 2}, {TP: 4}, {PP: 4}, {TP: 2}],
}
MODELS = {
    "llama bf16": ("llama", {}, torch.bfloat16),
    "qwen2 tied fp32": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 129}, torch.float32),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                assert name not in out
                out[name] = opened.get_tensor(name)
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_byte_comes_back(name, ranks, tmp_path):
    kind, changes, dtype = MODELS[name]
    folder = Path(tiny_models.save(kind, tmp_path / "hf", dtype=dtype, **changes))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    jobs = []
    for index, layout in enumerate(LAYOUTS[ranks]):
        arguments = arguments_for(layout)
        arguments.mixed_precision = "bf16_mixed" if dtype is torch.bfloat16 else "fp32"
        # the second half of the layouts writes several files with an index
        jobs.append((str(folder), arguments, str(tmp_path / f"out{index}"), 10**9 if index % 2 == 0 else 50_000))
    run_distributed(round_trip, ranks, jobs)
    want = tensors(folder)
    assert any(value.float().abs().max() > 0 for value in want.values())
    for _, arguments, target, max_shard_bytes in jobs:
        got = tensors(Path(target))
        assert set(got) == set(want)
        for tensor, value in want.items():
            assert got[tensor].dtype == value.dtype and got[tensor].shape == value.shape, (tensor, arguments.model)
            assert torch.equal(got[tensor].view(torch.uint8), value.view(torch.uint8)), (tensor, arguments.model)
        assert json.loads((Path(target) / "config.json").read_text()) == json.loads(
            (folder / "config.json").read_text()
        )
        assert (Path(target) / "chat_template.jinja").read_text() == "{{ messages }}"
        if max_shard_bytes < 10**9:
            index = json.loads((Path(target) / "model.safetensors.index.json").read_text())
            assert set(index["weight_map"]) == set(want)
            assert len(set(index["weight_map"].values())) > 2
        assert not list(tmp_path.glob(".*"))


def test_the_export_loads_in_transformers_with_equal_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_models.save("llama", tmp_path / "hf", rope=family_models.LLAMA3_ROPE)
    run_distributed(round_trip, 2, [(folder, arguments_for({TP: 2}), str(tmp_path / "out"), 10**9)])
    ids = torch.arange(180).view(2, 90)
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        want = tiny_models.build("llama", rope=family_models.LLAMA3_ROPE)(ids).logits
    assert torch.equal(got, want)
