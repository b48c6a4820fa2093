"""run.yaml: written whole, read back equal, and itself a configuration."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from primus_bridge.config import describe, load_arguments, read_run_yaml, write_run_yaml
from primus_bridge.config.follow import check_alternatives
from primus_bridge.config.run_yaml import from_plain
from primus_bridge.config.validate import validate
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
    assert re.fullmatch(
        rf"command line --lr \(by {re.escape(str(tmp_path))}/run.yaml:\d+\)", again.sources["optimizer.lr"]
    )


def test_every_value_remembers_where_it_came_from(write):
    """Through a job's config, and once more: the places, the defaults, and nothing to say of what nobody set."""
    words = ["--save", "s", "--tensor_model_parallel_size", "2", "--convert_from_hf", "--peft", "none"]
    config = "train_iters: 3\nlr: 1.0e-4\ndata_path: rows\nhf_model_name_or_path: model\nrecompute_granularity: full\n"
    first = load_arguments(write(config), words)
    validate(first)
    write_run_yaml(first, "config_0.yaml")
    second = load_arguments("config_0.yaml", [])
    validate(second)
    write_run_yaml(second, "run.yaml")
    third = load_arguments("run.yaml", [])
    validate(third)
    assert first.to_dict() == second.to_dict() == third.to_dict()
    assert first.notes == second.notes == third.notes == []
    for arguments, file in ((second, "config_0"), (third, "run")):
        for name, value, source in describe(first):
            if source == "default" or source.startswith("follows recompute_granularity"):
                assert arguments.sources[name].split(" (")[0] == source.split(" (")[0], (name, value)
            else:
                brought = re.escape(source) + rf" \(by {file}\.yaml:\d+\)"
                assert re.fullmatch(brought, arguments.sources[name]), (name, value)
    # what is wrong with a value names both places
    place = second.sources["optimizer.lr"]
    assert place.startswith("config.yaml:2 (by config_0.yaml:")
    second.optimizer.lr = -1
    with pytest.raises(ConfigError, match=re.escape(place)):
        validate(second)


def test_an_edited_value_comes_from_the_file(write):
    words = "--lr 1e-4 --num_epochs 2 --save s --data_path rows --hf_model_name_or_path model --convert_from_hf".split()
    first = load_arguments(None, words)
    first.train.global_batch_size = 16  # a default of another version
    check_alternatives(first)
    write_run_yaml(first, "run.yaml")
    written = Path("run.yaml").read_text()

    def edited(*changes: tuple[str, str]):
        text = written
        for before, after in changes:
            assert text.count(before) == 1
            text = text.replace(before, after)
        return load_arguments(write(text, "edited.yaml"), [])

    found = edited(("  lr: 0.0001", "  lr: 0.0002"), ("clip_grad: 1.0", "clip_grad: 2.0"))
    assert (found.optimizer.lr, found.optimizer.clip_grad, found.train.global_batch_size) == (2e-4, 2.0, 16)
    for name in ("optimizer.lr", "optimizer.clip_grad", "train.global_batch_size"):
        assert re.fullmatch(r"edited\.yaml:\d+", found.sources[name])
    assert found.sources["checkpoint.save"].startswith("command line --save (by edited.yaml:")
    # what followed another argument is given now
    with pytest.raises(ConfigError, match=r"num_epochs and train_iters \(edited.yaml:\d+\) are both set"):
        check_alternatives(edited(("train_iters: 100", "train_iters: 50")))
    # full fine-tuning stays full, whatever is said of adapters
    found = edited(("dim: 16", "dim: 8"))
    assert found.peft.scheme is None and "'peft.dim' has no effect here" in found.notes[0]
    # a file of a version without digests: both places
    bare = {**yaml.safe_load(written)}
    assert all(isinstance(source, str) for source in bare["sources"].values())
    del bare["source_digests"]
    found = load_arguments(write(yaml.safe_dump(bare), "bare.yaml"), [])
    assert re.fullmatch(r"command line --lr \(by bare.yaml:\d+\)", found.sources["optimizer.lr"])


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
