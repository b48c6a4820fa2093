"""The files of a Primus experiment: which module is ours, what it extends, and where its presets are."""

from __future__ import annotations

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


def test_extends_merges_deeply_and_the_local_file_wins(write):
    write(
        "exp_name: base\nmodules:\n  m:\n    framework: megatron_bridge\n    overrides:\n"
        "      finetune_lr: 1e-4\n      train_iters: 10\n      peft: {dim: 4, alpha: 8}\n",
        "shared/base.yaml",
    )
    local = "extends: shared/base.yaml\nexp_name: mine\nmodules:\n  m:\n    overrides: {lr: 2e-4, peft: {alpha: 9}}\n"
    arguments = load_arguments(write(local), [])
    assert (arguments.optimizer.lr, arguments.train.train_iters) == (2e-4, 10)
    assert (arguments.peft.dim, arguments.peft.alpha) == (4, 9.0)
    assert arguments.sources["train.train_iters"] == "shared/base.yaml:7"
    assert arguments.checkpoint.save == "output/mine"


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
    text = "modules:\n  m:\n    framework: megatron_bridge\n    config: theirs.yaml\n"
    arguments = load_arguments(write(text), [])
    assert (arguments.stage, arguments.optimizer.lr) == ("sft", 3e-4)
    assert any("'trainable' has no effect" in note for note in arguments.notes)
