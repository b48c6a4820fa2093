"""The files of a Primus experiment: which module is ours, what it extends, and where its presets are."""

from __future__ import annotations

import os
import sys

from primus_bridge.config import load_arguments


def test_exactly_one_module_of_ours(write, refuse):
    other = "modules:\n  a:\n    framework: megatron\n  b:\n    config: x\n"
    assert refuse(write(other)) == (
        "config.yaml:1: exactly one module with 'framework: megatron_bridge' is needed; "
        "found: a (megatron), b (no framework)"
    )
    two = "modules:\n  a:\n    framework: megatron_bridge\n  b:\n    framework: megatron_bridge\n"
    assert "found: a (megatron_bridge), b (megatron_bridge)" in refuse(write(two))
    beside = "modules:\n  a:\n    framework: megatron\n  b:\n    framework: megatron_bridge\n"
    assert load_arguments(write(beside), []).framework == "megatron_bridge"


def test_extends_merges_deeply_and_the_local_file_wins(write, refuse):
    write(
        "exp_name: base\nmodules:\n  m:\n    framework: megatron_bridge\n    overrides:\n"
        "      finetune_lr: 1e-4\n      train_iters: 10\n      peft: {dim: 4, alpha: 8}\n",
        "shared/base.yaml",
    )
    local = "extends: shared/base.yaml\nexp_name: mine\nmodules:\n  m:\n    overrides: {lr: 2e-4, peft: {alpha: 9}}\n"
    assert refuse(write(local)).startswith("config.yaml:5: 'lr' contradicts 'finetune_lr' (shared/base.yaml:6): both")
    arguments = load_arguments(write(local.replace("{lr", "{finetune_lr")), [])
    assert (arguments.optimizer.lr, arguments.train.train_iters) == (2e-4, 10)
    assert (arguments.peft.dim, arguments.peft.alpha) == (4, 9.0)
    assert arguments.sources["train.train_iters"] == "shared/base.yaml:7"
    assert arguments.checkpoint.save == "output/mine"


BASE = """\
exp_name: base
modules:
  m:
    framework: megatron_bridge
    config: sft_trainer.yaml
    model: qwen3_8b.yaml
    overrides:
"""
CHILD = "extends: base.yaml\nmodules:\n  m:\n    overrides:\n"


def lines(text: str, *overrides: str) -> str:
    return text + "".join(f"      {line}\n" for line in overrides)


def test_a_null_replaces_the_value_of_a_base_and_of_a_preset(write, refuse):
    write("lr: 1e-3\nsave_interval: 7\nlora: {dim: 4, alpha: 2}\n", "mine.yaml")
    keys = {"packed_sequence": "true", "train_iters": "500", "lr_warmup_iters": "100", "min_lr": "1e-6"}
    keys |= {"eval_iters": "5", "recompute_granularity": "full", "recompute_method": "block"}
    write(lines(BASE.replace("sft_trainer", "mine"), *(f"{key}: {value}" for key, value in keys.items())), "base.yaml")
    nulls = (f"{key}: null" for key in [*list(keys)[:-1], "lr", "save_interval", "lora: {alpha: 8, dim"])
    config = write(lines(CHILD, *nulls).replace("dim: null", "dim: null}"))
    arguments = load_arguments(config, [], "posttrain")
    train, scheduler = arguments.train, arguments.scheduler
    assert (arguments.dataset.packed_sequence, train.train_iters, train.eval_iters) == (False, 1000, 32)
    assert (scheduler.lr_warmup_iters, arguments.optimizer.min_lr, arguments.optimizer.lr) == (50, 0.0, 1e-4)
    assert (arguments.checkpoint.save_interval, arguments.peft.dim, arguments.peft.alpha) == (None, 32, 8.0)
    assert (arguments.model.recompute_granularity, arguments.model.recompute_method) == (None, None)
    assert arguments.sources["train.train_iters"] == "flavor qwen3_8b_finetune_config"
    idle = "base.yaml:14: 'recompute_method' has no effect here: recompute_granularity is null"
    assert idle in arguments.notes
    message = refuse(write(lines(CHILD, "recipe: null", "flavor: null")))
    assert message.startswith("config.yaml:5: 'recipe' is null, and Primus runs no module without one")


def test_a_word_replaces_a_mapping_and_a_mapping_a_word(write):
    write(lines(BASE, "peft: {dim: 8, alpha: 16, dropout: 0.1}", "dataset: {seq_length: 64}"), "base.yaml")
    peft = load_arguments(write(lines(CHILD, "peft: lora", "dataset: null")), []).peft
    assert (peft.scheme, peft.dim, peft.alpha, peft.dropout) == ("lora", 32, 32.0, 0.0)
    write(lines(BASE, "peft: none"), "base.yaml")
    peft = load_arguments(write(lines(CHILD, "peft: {dim: 8}")), []).peft
    assert (peft.scheme, peft.dim) == ("lora", 8)


def test_of_the_model_preset_what_the_module_preset_leaves_open(write):
    """Key by key at the top: a section of the module's preset is the whole section, as in Primus."""
    write("seq_length: 32\ntrain_iters: 5\nlora: {dim: 4}\n", "size.yaml")
    write("train_iters: 6\nlora: {alpha: 8}\n", "kind.yaml")
    text = lines(BASE.replace("sft_trainer", "kind").replace("qwen3_8b", "size"), "use_lora: true")
    arguments = load_arguments(write(text), [])
    assert (arguments.model.seq_length, arguments.train.train_iters) == (32, 6)
    assert (arguments.sources["peft.dim"], arguments.peft.alpha) == ("default", 8.0)


def test_what_stands_beside_the_module(write):
    """workspace is a path; platform is Primus's own."""
    text = lines(BASE.replace("exp_name: base", "exp_name: x\nworkspace: ~/ws"), "train_iters: 3")
    arguments = load_arguments(write(text), [])
    assert arguments.checkpoint.save == os.path.expanduser("~/ws/x")
    assert not any("platform" in note for note in arguments.notes)
    platform = "platform: {config: nosuch.yaml, overrides: {wrkspace: 1}}\n"
    told = [note for note in load_arguments(write(platform + text), []).notes if "platform" in note]
    assert len(told) == 1 and told[0].startswith("config.yaml:1: 'platform' has no effect here: it is Primus's cluster")


def test_presets_beside_the_file_come_before_ours_and_the_module_preset_wins_over_the_model(write, refuse):
    write("hf_path: mine\nlr: 1e-3\nseq_length: 64\n", "qwen3_8b.yaml")
    text = "modules:\n  m:\n    framework: megatron_bridge\n    model: qwen3_8b\n    config: lora_trainer.yaml\n"
    arguments = load_arguments(write(text), [])
    assert (arguments.checkpoint.hf_model_name_or_path, arguments.model.seq_length) == ("mine", 64)
    assert (arguments.optimizer.lr, arguments.sources["optimizer.lr"]) == (2e-4, "recipes/lora_trainer.yaml:6")
    assert arguments.sources["model.seq_length"] == "qwen3_8b.yaml:3"
    message = refuse(write(text.replace("lora_trainer", "sft_trainr")))
    assert "config.yaml:5: no preset 'sft_trainr.yaml' for 'config' in ., recipes" in message
    assert "did you mean 'sft_trainer.yaml'" in message


def test_a_file_never_means_itself(write):
    """An experiment of the preset's name, and one that gets its module from another file."""
    module = "modules:\n  m:\n    framework: megatron_bridge\n    model: qwen3_8b.yaml\n"
    own = load_arguments(write(module, "qwen3_8b.yaml"), [])
    write(module, "base.yaml")
    above = load_arguments(write("extends: base.yaml\nexp_name: x\n", "qwen3_8b.yaml"), [])
    for arguments in (own, above):
        assert arguments.sources["checkpoint.hf_model_name_or_path"] == "recipes/qwen3_8b.yaml:4"


def test_a_preset_of_an_installed_primus(write, tmp_path, monkeypatch):
    write(
        "extends: [../module_base.yaml]\nstage: sft\nlr: 3e-4\n",
        "lib/primus/configs/modules/megatron_bridge/theirs.yaml",
    )
    write("trainable: false\nsink_level: INFO\n", "lib/primus/configs/modules/module_base.yaml")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "primus", raising=False)  # another test's
    text = "modules:\n  m:\n    framework: megatron_bridge\n    config: theirs.yaml\n"
    arguments = load_arguments(write(text), [])
    assert (arguments.stage, arguments.optimizer.lr) == ("sft", 3e-4)
    assert any("'trainable' has no effect" in note for note in arguments.notes)
