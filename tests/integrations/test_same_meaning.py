"""A file of Primus's dialect means the same whoever reads it, our command or Primus: the same values, or both refuse.

PRIMUS_CHECKOUT=/path/to/Primus pytest tests/integrations  asks a real Primus, too.
"""

from __future__ import annotations

import json
import sys

from primus_bridge.adapter import MegatronBridgeAdapter
from primus_bridge.config import load_arguments
from primus_bridge.config.validate import validate
from primus_bridge.errors import ConfigError
from tests.integrations.test_primus import in_every_host, script

HEAD = """\
work_group: team
user_name: me
exp_name: e
workspace: out
modules:
  post_trainer:
    framework: megatron_bridge
    config: sft_trainer.yaml
    model: qwen3_8b.yaml
    overrides: {BASE}
"""
CHILD = "extends: [base.yaml]\nmodules: {post_trainer: {overrides: {OVER}}}\n"
RECOMPUTE = "recompute_granularity: full, recompute_method: block, recompute_num_layers: 2"

SAME = [
    ("lr: 1.0e-4", "lr: 1.0e-5"),
    ("packed_sequence: true, train_iters: 500, lr_warmup_iters: 100", "packed_sequence: null, train_iters: null"),
    ("lr_warmup_iters: 100, min_lr: 1.0e-6, eval_iters: 5", "lr_warmup_iters: null, min_lr: null, eval_iters: null"),
    (
        "lr_decay_iters: 70, save_interval: 3, finetune_lr: 3.0e-3",
        "lr_decay_iters: null, save_interval: null",
    ),
    ("peft: {dim: 8, alpha: 16, dropout: 0.1}", "peft: lora"),
    ("peft: {dim: 8, alpha: 16}", "peft: {alpha: 2}"),
    ("peft: none", "peft: {dim: 8}"),
    ("stage: pretrain", "stage: sft"),
    ("peft: lora", "peft: null"),
    ("use_dora: true, peft_dim: 4", "peft: lora"),
    ("peft: dora", "peft: lora"),
    ("lora: {enabled: true, dim: 4}", "lora: null"),
    ("data_path: mine", "data_path: yours"),
    ("dataset_name: mine", "dataset: null"),
    ("sft_dataset_name: mine, hf_model_name_or_path: m", "seq_length: 64"),
    ("finetune_lr: 1.0e-4", "finetune_lr: null, lr: 2.0e-4"),
    ("scheduler: {start_weight_decay: 0.1, end_weight_decay: 0.2}", "scheduler: {end_weight_decay: 0.1}"),
    ("optimizer: {weight_decay: 0.1}", "train_iters: 100"),
    (RECOMPUTE, "recompute_granularity: null"),
    (RECOMPUTE, "recompute_method: null"),
    ("train_iters: 500", "train_iters: null, num_epochs: 2"),
    ("moe_aux_loss_coeff: 0.1", "moe_aux_loss_coeff: 0"),
    ("flavor: qwen3_8b_sft_config", "precision_config: fp32"),
]
"""Overrides of a file, and of one that extends it."""

REFUSED = [
    ("finetune_lr: 1.0e-4", "lr: 1.0e-5"),
    ("dataset_name: mine", "dataset: {data_path: yours}"),
    ("lr: 1.0e-4, finetune_lr: 1.0e-5", ""),
    ("use_lora: true, peft: none", ""),
    ("checkpoint: {save: a}, save: b", ""),
    ("seq_length: 64, dataset: {seq_length: 32}", ""),
    ("scheduler: {start_weight_decay: 0.1, end_weight_decay: 0.1}", "scheduler: {end_weight_decay: 0.2}"),
    ("scheduler: {start_weight_decay: 0.1}", ""),
    ("train_iters: 500", "num_epochs: 2"),
    ("peft: lora", "recipe: null, flavor: null"),
    ("peft: lora", "flavor: null"),
    (RECOMPUTE, "recompute_granularity: selective"),
    ("moe_aux_loss_coeff: 0", "moe_aux_loss_coeff: 0.1"),
]

READ_THERE = """
import json
from pathlib import Path
from primus.core.config.primus_config import load_primus_config
from primus_bridge.adapter import as_dict
folders = %s
print(json.dumps([as_dict(load_primus_config(Path(folder, "child.yaml")).modules[0].params) for folder in folders]))
"""


def outcome(read) -> str | dict:
    """What is trained, or the message."""
    try:
        arguments = read()
        arguments.checkpoint.save = "run"  # which is of the experiment's names, like the project
        validate(arguments)
    except ConfigError as error:
        return str(error)
    values = arguments.to_dict()
    del values["logger"]["wandb_project"]
    return values


@in_every_host
def test_every_reader_of_a_file_reads_the_same(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(host))
    monkeypatch.delitem(sys.modules, "primus", raising=False)  # another test's
    folders = []
    for number, (base, over) in enumerate([*SAME, *REFUSED]):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / "base.yaml").write_text(HEAD.replace("BASE", base))
        (folders[-1] / "child.yaml").write_text(CHILD.replace("OVER", over))
    merged = script(host, READ_THERE % json.dumps([str(folder) for folder in folders]))
    adapter = MegatronBridgeAdapter()
    for case, folder, params in zip([*SAME, *REFUSED], folders, merged, strict=True):
        ours = outcome(lambda folder=folder: load_arguments(str(folder / "child.yaml"), [], "posttrain"))
        theirs = outcome(lambda params=params: adapter.convert_config(params))
        if case in SAME:
            assert not isinstance(ours, str) and ours == theirs, case
        else:
            assert isinstance(ours, str) and isinstance(theirs, str), case
    # the command line of Primus's runtime, which merges its words into the same settings
    wrong = outcome(lambda: adapter.convert_config({**merged[0], "finetune_lr": "3e-5"}))
    assert wrong == (
        "Primus module settings: 'lr' and 'finetune_lr' both set optimizer.lr, to 1e-05 and 3e-05, and Primus's "
        "merging loses which is the later one: keep one name, or set the other to null"
    )
    assert adapter.convert_config({**merged[0], "lr": "null", "finetune_lr": "3e-5"}).optimizer.lr == 3e-5
    own = outcome(lambda: adapter.convert_config({**merged[0], "dataset_name": "mine", "hf_model_name_or_path": "m"}))
    assert (own["dataset"]["data_path"], own["checkpoint"]["hf_model_name_or_path"]) == ("mine", "m")
