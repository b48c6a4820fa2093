"""LoRA against peft: the same start, the same steps, the same logits from the export, at every layout."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import family_models, peft_adapters, tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for, pad_batch, synthetic_rows
from tests.distributed.rank_functions import train_and_export_lora
from tests.distributed.test_round_trip import tensors
from tests.distributed.test_transformers import hf_loss

STEPS = 4
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
LAYOUTS = {
    1: {"one rank": {}, "recompute full": {"recompute_granularity": "full"}},
    2: {"TP2": TP2, "TP2+SP": TP2 | SP, "PP2": PP2, "DP2": {}},
    4: {"TP2xPP2+SP": TP2 | PP2 | SP},
}


def _arguments(layout: dict, targets: list[str]):
    return arguments_for(
        layout,
        peft={"scheme": "lora", "dim": 4, "alpha": 12.0, "target_modules": targets},
        optimizer={"lr": 2e-2, "weight_decay": 0.0},
        scheduler={"lr_decay_style": "constant"},
        train={"train_iters": STEPS},
    )


def _run(folder: str, root: Path, ranks: int, targets: list[str]) -> dict[str, list[dict]]:
    """The steps at each layout of that many ranks; the exports are in root/layout."""
    runs = [(_arguments(layout, targets), str(root / name)) for name, layout in LAYOUTS[ranks].items()]
    results = run_distributed(train_and_export_lora, ranks, folder, runs, STEPS)[0]
    return dict(zip(LAYOUTS[ranks], results, strict=True))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request, tmp_path_factory):
    tied = {"tie_word_embeddings": request.param == "qwen2"}
    return request.param, tiny_models.save(request.param, tmp_path_factory.mktemp(request.param), **tied)


@pytest.mark.parametrize(
    ("model", "targets"),
    [("llama", ALL), ("qwen2", FUSED), ("llama", ["up_proj", "o_proj"]), ("qwen2", ["q_proj", "v_proj"])],
    indirect=["model"],
    ids=str,
)
def test_every_layout_trains_the_same_adapters(model, targets, tmp_path):
    _, folder = model
    results = {}
    for ranks in LAYOUTS:
        results |= _run(folder, tmp_path, ranks, targets)
    single, want = results.pop("one rank"), tensors(tmp_path / "one rank" / "adapter")
    assert len({round(step["loss"], 4) for step in single}) == STEPS
    for name, result in results.items():
        assert [s["loss"] for s in result] == pytest.approx([s["loss"] for s in single], rel=1e-4), name
        assert [s["grad_norm"] for s in result] == pytest.approx([s["grad_norm"] for s in single], rel=1e-4), name
        got = tensors(tmp_path / name / "adapter")
        assert set(got) == set(want), name
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize(
    ("model", "targets"), [("qwen2", ALL), ("llama", ["q_proj", "v_proj"])], indirect=["model"], ids=str
)
def test_steps_and_export_equal_peft(model, targets, tmp_path):
    kind, folder = model
    out = tmp_path / "trained"
    losses = run_distributed(train_and_export_lora, 2, folder, [(_arguments(TP2, targets), str(out))], STEPS)[0][0]
    # the untrained adapter: our A, B = 0
    untrained = _arguments(TP2, targets)
    run_distributed(train_and_export_lora, 2, folder, [(untrained, str(tmp_path / "start"))], 0)

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "start" / "adapter", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    rows = synthetic_rows(base.config.vocab_size, 8 * STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = hf_loss(theirs, pad_batch(rows[8 * step : 8 * step + 8], 24))
        assert losses[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()

    ids = torch.arange(96).view(2, 48)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        before = plain(ids).logits
        loaded = peft.PeftModel.from_pretrained(plain, out / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)(ids).logits
        trained = theirs.eval()(ids).logits
    assert (loaded - before).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-3)
    torch.testing.assert_close(merged, loaded, rtol=0, atol=1e-5)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == folder
    assert config["target_modules"] == [name for name in ALL if name in targets]
    assert (config["r"], config["lora_alpha"]) == (4, 12.0)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama, biases, linear rope", FUSED),
        ("gpt2", ["all-linear"]),
        ("phi3, window, partial rotary", ["linear_qkv", "gate_up_proj"]),
        ("gemma2", ["q_proj", "linear_fc1"]),
    ],
)
def test_new_dora_adapters_are_pefts(name, targets, tmp_path):
    """Started, trained and exported here; with peft the same as merged, and all of it moved."""
    folder = family_models.save(name, tmp_path / "model")
    arguments = _arguments(TP2 | SP, targets)
    arguments.peft.use_dora = arguments.peft.use_rslora = True
    run_distributed(train_and_export_lora, 2, folder, [(arguments, str(tmp_path))], 2)
    ids = torch.arange(96).view(2, 48)
    before, adapted = peft_adapters.logits(folder, str(tmp_path / "adapter"), ids)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    assert (adapted - before).abs().max() > 0.05
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)
    starts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for key, value in tensors(tmp_path / "adapter").items():
        if key.endswith("magnitude_vector"):
            weight = starts[key.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")]
            start = weight.norm(dim=0 if name == "gpt2" else 1)
            # two steps of the rate from the lengths that the rows had
            assert 0.005 < (value - start).abs().mean() < 0.05, key
