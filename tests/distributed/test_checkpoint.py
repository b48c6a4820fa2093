"""Checkpoints: resumed to the bit at the same layout, to rounding at another; committed by the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from primus_bridge.checkpoint.manifest import MANIFEST, TRACKER, committed, find, latest
from primus_bridge.checkpoint.pruning import prune
from primus_bridge.errors import ConfigError
from tests import tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.distributed.rank_functions import save_and_resume

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LORA = {"scheme": "lora", "dim": 4, "dropout": 0.1, "target_modules": ["q_proj", "gate_proj", "o_proj"]}
FUSED = {"scheme": "lora", "dim": 4, "target_modules": ["linear_qkv", "linear_fc1"]}


def _arguments(layout: dict, peft: dict | None = None, precision: str = "fp32"):
    arguments = arguments_for(
        layout,
        optimizer={"lr": 2e-3},
        scheduler={"lr_warmup_iters": 3},
        train={"train_iters": 10},
        peft=peft or {},
    )
    arguments.mixed_precision = precision
    return arguments


@pytest.mark.parametrize(
    ("ranks", "layout", "peft", "precision"),
    [
        (1, {}, None, "fp32"),
        (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}, None, "fp32"),
        (4, TP2, None, "bf16_mixed"),
        (4, TP2 | PP2, LORA, "bf16_mixed"),
    ],
)
def test_five_steps_and_five_more_are_ten_to_the_bit(ranks, layout, peft, precision, tmp_path):
    folder = tiny_models.save("qwen2", tmp_path / "hf", tie_word_embeddings=True)
    arguments = _arguments(layout, peft, precision)
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    jobs = [(arguments, whole, 0, 10, None), (arguments, part, 0, 5, None), (arguments, part, 5, 10, part)]
    for unbroken, first, second in run_distributed(save_and_resume, ranks, folder, jobs):
        assert first["steps"] + second["steps"] == unbroken["steps"]
        assert torch.equal(second["random"], unbroken["random"])
        for name, weight in unbroken["weights"].items():
            assert torch.equal(second["weights"][name], weight), name
    files = find(Path(part)).manifest.files
    assert "common.pt" in files and any(name.endswith(".distcp") for name in files)
    assert {f"state/rng.rank_{rank:05d}.pt" for rank in range(ranks)} <= set(files)
    if peft:
        assert sum(files[name] for name in files if name.endswith(".distcp")) < 400_000


@pytest.mark.parametrize(
    ("ranks", "before", "after", "peft"),
    [
        (4, TP2 | PP2, {}, None),
        (4, PP2, TP2 | {"sequence_parallel": True}, None),
        (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}, TP2, None),
        (4, TP2, {"tensor_model_parallel_size": 4}, LORA | {"dropout": 0.0}),
        (2, TP2, {}, FUSED),
    ],
)
def test_another_layout_continues_to_rounding(ranks, before, after, peft, tmp_path):
    folder = tiny_models.save("llama", tmp_path / "hf")
    whole, part, other = str(tmp_path / "whole"), str(tmp_path / "part"), str(tmp_path / "other")
    jobs = [
        (_arguments(before, peft), whole, 0, 10, None),
        (_arguments(before, peft), part, 0, 5, None),
        (_arguments(after, peft), other, 5, 10, part),
    ]
    unbroken, first, second = run_distributed(save_and_resume, ranks, folder, jobs)[0]
    got = [step["loss"] for step in first["steps"] + second["steps"]]
    assert got == pytest.approx([step["loss"] for step in unbroken["steps"]], rel=1e-5)
    assert [step["lr"] for step in second["steps"]] == [step["lr"] for step in unbroken["steps"][5:]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A save folder with checkpoints of steps 1, 2 and 3."""
    root = tmp_path_factory.mktemp("saved")
    folder = tiny_models.save("llama", root / "hf")
    save = str(root / "save")
    jobs = [(_arguments({}), save, 0, 1, None), (_arguments({}), save, 1, 2, save), (_arguments({}), save, 2, 3, save)]
    run_distributed(save_and_resume, 1, folder, jobs)
    return Path(save)


def _copy(saved: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, target))


def test_the_newest_committed_checkpoint_is_chosen(saved, tmp_path):
    save = _copy(saved, tmp_path / "save")
    assert latest(save).manifest.step == 3
    assert (save / TRACKER).read_text() == "3"
    (save / "iter_0000003" / MANIFEST).unlink()  # killed before the commit
    assert latest(save).manifest.step == 2
    assert find(save / "iter_0000001").manifest.step == 1


def test_a_damaged_checkpoint_is_named(saved, tmp_path):
    save = _copy(saved, tmp_path / "save")
    shard = next((save / "iter_0000003").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=rf"damaged checkpoint: {shard.name} should have \d+ bytes"):
        latest(save)


def test_save_total_limit_keeps_the_newest(saved, tmp_path):
    save = _copy(saved, tmp_path / "save")
    prune(save, 2)
    assert [path.name for path in committed(save)] == ["iter_0000002", "iter_0000003"]
    assert not (save / "iter_0000001").exists()


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        find(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="holds no committed checkpoint"):
        find(tmp_path)


def test_the_manifest_says_what_is_there(saved):
    manifest = json.loads((saved / "iter_0000002" / MANIFEST).read_text())
    assert manifest["step"] == 2 and manifest["training_state"] and manifest["contents"] == "model"
    assert "torch" in manifest["versions"]
    assert manifest["files"]["hf_assets/config.json"] > 0


def test_a_resumed_run_follows_its_own_arguments(tmp_path):
    """A changed learning rate or length takes effect, as in a run that had it from the start."""
    folder = tiny_models.save("llama", tmp_path / "hf")
    changed = _arguments({})
    changed.optimizer.lr, changed.optimizer.adam_beta2, changed.train.train_iters = 5e-4, 0.95, 20
    part = str(tmp_path / "part")
    jobs = [
        (_arguments({}), part, 0, 5, None),
        (changed, part, 5, 8, part),
        (changed, str(tmp_path / "whole"), 0, 8, None),
    ]
    _, second, whole = run_distributed(save_and_resume, 1, folder, jobs)[0]
    assert [step["lr"] for step in second["steps"]] == [step["lr"] for step in whole["steps"][5:]]
