"""Megatron-Bridge's finetune end to end on the CPU, beside the core engine: losses, resume, LoRA, export, dry run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from primus_bridge.cli.main import main
from tests.bridge.conftest import in_bridge, json_of, portable_model
from tests.cli.example import alpaca_rows, train_words, workplace, write_rows

DIGITS = 1e-6
"""Of what the engine prints, relative."""


def losses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"iteration +\d+/.*?lm loss: (\S+)", text)]


def evaluations(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"validation loss at iteration .*?lm loss value: (\S+)", text)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict]:
    """The folder, and by name: exit code, stdout and stderr of each command of engine bridge."""
    folder: Path = tmp_path_factory.mktemp("engines")
    portable_model(folder / "model", vocab_size=204)
    write_rows(folder / "rows.json", alpaca_rows(24))
    options = {"engine": "bridge", "validation_split": 0.25, "eval_interval": 2, "lr_decay_iters": 4, "nproc": 1}
    lora = {**options, "use_lora": True, "convert_from_hf": None, "pretrained_checkpoint": "sft/pretrained"}
    commands = {
        # two processes of torch's launcher, which also import the weights; the run then goes on in one
        "sft": train_words("model", "rows.json", "sft", **options | {"nproc": 2, "tensor_model_parallel_size": 2}),
        "resumed": train_words("model", "rows.json", "sft", **options | {"train_iters": 4, "convert_to_hf": True}),
        "lora": train_words("model", "rows.json", "lora", **lora),
        "dry run": [*train_words("model", "rows.json", "dry", **options), "--dry_run"],
        "another kind": train_words("model", "rows.json", "sft", engine="bridge", use_lora=True, nproc=1),
    }
    (folder / "commands.json").write_text(json.dumps(commands))
    done = in_bridge("0.3", folder, "-m", "tests.bridge.runs", "commands.json", "out.json", devices=2)
    results = json_of(done, folder / "out.json")
    results["sft"][1] += done.stdout  # what its ranks printed
    return folder, results


@pytest.fixture(scope="module")
def core(runs, tmp_path_factory) -> Path:
    """The same two runs of engine core."""
    options = {"validation_split": 0.25, "eval_interval": 2, "lr_decay_iters": 4, "tensorboard": False}
    with workplace(tmp_path_factory.mktemp("core")) as folder:
        model, data = runs[0] / "model", runs[0] / "rows.json"
        assert main(train_words(model, data, "sft", **options, train_iters=4)) == 0
        assert main(train_words(model, data, "lora", **options, use_lora=True, train_iters=1)) == 0
        yield folder


def lines(save: Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def test_the_same_losses_as_the_core_engine(runs, core):
    (code, first, error), (resumed_code, resumed, resumed_error) = runs[1]["sft"], runs[1]["resumed"]
    assert (code, resumed_code) == (0, 0), error[-3000:] + resumed_error[-3000:]
    assert len(losses(first)) == len(losses(resumed)) == 2
    assert losses(first) + losses(resumed) == pytest.approx(lines(core / "sft", "loss"), rel=DIGITS)


def test_the_same_evaluations(runs, core):
    after_2, after_4 = lines(core / "sft", "eval_loss")
    found = evaluations(runs[1]["sft"][1]) + evaluations(runs[1]["resumed"][1])
    # it evaluates at the end once more
    assert found == pytest.approx([after_2, after_2, after_4, after_4], rel=DIGITS)


def test_what_a_run_leaves(runs):
    save = runs[0] / "sft"
    names = {path.name for path in save.iterdir()}
    assert {"run.yaml", "container.yaml", "ledger.json", "iter_0000002", "iter_0000004", "tensorboard", "hf"} <= names
    assert "engine: bridge" in (save / "run.yaml").read_text()
    assert "_target_: megatron.bridge.training.config.ConfigContainer" in (save / "container.yaml").read_text()


def test_the_export_is_the_trained_model(runs, core):
    from safetensors.torch import load_file

    start, trained = load_file(runs[0] / "model" / "model.safetensors"), load_file(runs[0] / "sft/hf/model.safetensors")
    assert start.keys() == trained.keys()
    moved = max((trained[name] - start[name]).abs().max().item() for name in start)
    assert 1e-4 < moved < 1e-1


def test_lora_starts_at_the_same_loss(runs, core):
    code, text, error = runs[1]["lora"]
    assert code == 0, error[-3000:]
    first, second = losses(text)
    assert first == pytest.approx(lines(core / "lora", "loss")[0], rel=DIGITS)
    assert second != first
    weights = [path.stat().st_size for path in (runs[0] / "lora" / "iter_0000002").glob("*.distcp")]
    base = [path.stat().st_size for path in (runs[0] / "sft" / "pretrained").rglob("*.distcp")]
    assert sum(weights) < sum(base) * 3  # adapters with their optimizer, without the base


def test_a_folder_of_another_kind_of_run_is_refused(runs):
    code, _, error = runs[1]["another kind"]
    assert code == 2 and "sft: holds checkpoints of another kind of run: give another --save" in error


def test_a_dry_run_prints_the_container_and_writes_nothing(runs):
    code, text, error = runs[1]["dry run"]
    assert code == 0, error[-3000:]
    container = yaml.safe_load(text)
    assert container["_target_"] == "megatron.bridge.training.config.ConfigContainer"
    assert container["optimizer"]["lr"] == 1e-3 and container["checkpoint"]["save"] == "dry"
    assert not (runs[0] / "dry").exists()


def test_a_packed_row_through_the_engines_own_reader(runs):
    ends, longest, length = runs[1]["packed"]
    assert (ends, longest, length) == ([0, 6, 8, 12], 6, 12)
