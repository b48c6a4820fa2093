"""A config of Primus, run: its flavor's numbers, SQuAD rendered as Megatron-Bridge does, other data as what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from primus_bridge.cli.main import main
from tests.cli.example import alpaca_rows, loss_lines, workplace, write_rows
from tests.data import families

CONFIG = """\
work_group: ${PRIMUS_TEAM:amd}
user_name: ${PRIMUS_USER:root}
exp_name: ${PRIMUS_EXP_NAME:tiny_lora}
workspace: ${PRIMUS_WORKSPACE:./output}

modules:
  post_trainer:
    framework: megatron_bridge
    config: sft_trainer.yaml
    model: tiny.yaml
    overrides:
      stderr_sink_level: DEBUG
      peft: lora
      train_iters: 4
      global_batch_size: 4
      lr_warmup_iters: 1
      seq_length: 64
      eval_interval: 2
      eval_iters: 2
      save_interval: 100
      finetune_lr: 1.0e-3
      precision_config: bf16_mixed
"""
PRESET = """\
recipe: qwen.qwen3
flavor: qwen3_8b_finetune_config
hf_path: model
dataset:
  dataset_name: data/squad
"""


def squad_rows(count: int) -> list[dict]:
    return [
        {"id": str(i), "context": f"{i} {i + 1}", "question": f"{i}", "answers": {"text": [f"{i + 1}"]}}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("primus")) as root:
        for name in ("squad", "alpaca"):
            (root / "data" / name).mkdir(parents=True)
        write_rows(root / "data" / "squad" / "train.jsonl", squad_rows(40))
        write_rows(root / "data" / "squad" / "validation.jsonl", squad_rows(5))
        write_rows(root / "data" / "alpaca" / "train.jsonl", alpaca_rows(20))
        families.qwen().save_pretrained(root / "tokenizer")
        (root / "config.yaml").write_text(CONFIG)
        (root / "tiny.yaml").write_text(PRESET)
        yield root


def test_it_runs_with_the_numbers_of_its_flavor(root):
    assert main(["train", "posttrain", "--framework", "megatron_bridge", "--config", "config.yaml"]) == 0
    save = root / "output" / "amd" / "root" / "tiny_lora"
    assert len(loss_lines(save)) == 4
    written = yaml.safe_load((save / "run.yaml").read_text())
    assert written["sources"]["optimizer.adam_beta2"] == "flavor qwen3_8b_finetune_config"
    assert (written["peft"]["dim"], written["optimizer"]["lr"], written["rng"]["seed"]) == (32, 1e-3, 5678)
    # a tenth of the training split, as Megatron-Bridge holds it out; the data's own validation split is its test set
    [source] = json.loads((save / "ledger.json").read_text())["sources"]
    assert [source["counts"][part]["samples"] for part in ("train", "validation")] == [36, 4]
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]


def previewed(*words: str) -> dict:
    """The first row, with a tokenizer that has all letters."""
    known = ["--tokenizer_model", "tokenizer", "--num", "1", "--shuffle", "false", "--seq_length", "256"]
    assert main(["preview", "--config", "config.yaml", *known, "--json", "out.jsonl", *words]) == 0
    return json.loads(Path("out.jsonl").read_text().splitlines()[0])


def test_squad_is_rendered_as_megatron_bridge_does(root):
    line = previewed()
    assert line["text"] == "Context: 0 1 Question: 0 Answer: 1<|im_end|>"
    assert line["supervised_text"] == " 1<|im_end|>"


def test_other_data_is_read_as_what_it_is(root):
    """There, the flavor's processor reads a context, a question and answers from whatever the name is."""
    line = previewed("--dataset_name", "data/alpaca")
    assert "### Instruction:\nsay 0\n\n### Response:\n0" in line["text"]
    assert line["supervised_text"] == "0<|im_end|>"
