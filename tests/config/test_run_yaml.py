"""run.yaml: written whole, read back equal, and itself a configuration."""

from __future__ import annotations

import os

import pytest
import yaml

from primus_bridge.config import load_arguments, read_run_yaml, write_run_yaml
from primus_bridge.config.run_yaml import from_plain
from primus_bridge.errors import ConfigError

WORDS = "--lr 1e-4 --use_lora --lora_target_modules q_proj,v_proj --save s --data_path ä/b --precision bf16".split()


def test_round_trip(write, tmp_path):
    arguments = load_arguments(write("training:\n  train_iters: 3\n"), WORDS)
    path = tmp_path / "deep" / "run.yaml"
    write_run_yaml(arguments, path)
    again = read_run_yaml(path)
    assert again == arguments
    assert again.sources["train.train_iters"] == "config.yaml:2"
    assert [entry.name for entry in path.parent.iterdir()] == ["run.yaml"]
    assert yaml.safe_load(path.read_text())["optimizer"]["lr"] == 1e-4


def test_it_is_a_configuration_to_run_again(tmp_path):
    arguments = load_arguments(None, WORDS)
    write_run_yaml(arguments, tmp_path / "run.yaml")
    again = load_arguments(str(tmp_path / "run.yaml"), ["--save", "other"])
    assert again.checkpoint.save == "other"
    again.checkpoint.save = "s"
    assert again.to_dict() == arguments.to_dict()
    assert again.sources["optimizer.lr"].startswith(f"{tmp_path}/run.yaml:")


def test_full_fine_tuning_stays_full(tmp_path):
    write_run_yaml(load_arguments(None, ["--save", "s"]), tmp_path / "run.yaml")
    assert load_arguments(str(tmp_path / "run.yaml"), []).peft.scheme is None


def test_arguments_travel_as_json():
    arguments = load_arguments(None, WORDS)
    arguments.notes.append("a note")
    assert from_plain(arguments.to_dict(), arguments.sources, arguments.notes) == arguments


def test_a_changed_file_is_checked(write):
    with pytest.raises(ConfigError, match="run.yaml:2: unknown argument 'optimizer.lrr' - did you mean 'optimizer.lr'"):
        read_run_yaml(write("optimizer:\n  lrr: 1\n", "run.yaml"))
    with pytest.raises(ConfigError, match="run.yaml:2: 'optimizer.lr' must be a number"):
        read_run_yaml(write("optimizer:\n  lr: x\n", "run.yaml"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_run_yaml(load_arguments(None, []), tmp_path / "file" / "run.yaml")
    if os.path.exists("/dev/full"):
        (tmp_path / ".run.yaml.partial").symlink_to("/dev/full")
        with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
            write_run_yaml(load_arguments(None, []), tmp_path / "run.yaml")
        assert not (tmp_path / "run.yaml").exists()
