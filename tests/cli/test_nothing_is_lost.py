"""What a wrong word must not cost: folders, tokens, the place in the data, the newest checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from primus_bridge.cli.main import main
from primus_bridge.conversion.hf_folder import check_export_folder, is_own_export
from primus_bridge.errors import ConfigError
from tests.cli.command import ROOT, Result, in_rank, run
from tests.cli.example import alpaca_rows, loss_lines, train_words, tree, workplace, write_rows
from tests.distributed.harness import run_distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("lost")) as root:
        write_rows(root / "rows.json", alpaca_rows(48))
        yield root


def refusal(capfd, words: list[str]) -> str:
    capfd.readouterr()
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert err.startswith("primus: ") and err.count("\n") == 1, err
    return err


# --- folders


@pytest.mark.parametrize("target", ["runs/x", "runs", "model", ".", "copy/.."])
def test_an_export_never_replaces_the_run_or_the_model(root, capfd, target):
    before = tree(root)
    words = train_words("model", "rows.json", "runs/x", convert_to_hf=True, hf_save_path=target)
    assert "the export would replace" in refusal(capfd, words)
    assert tree(root) == before


def test_an_export_replaces_only_an_export(root, capfd):
    words = train_words("model", "rows.json", "exports", convert_to_hf=True)
    assert main(words) == 0
    assert is_own_export(root / "exports" / "hf")
    shutil.copytree(root / "model", "mine")
    Path("mine/notes.txt").write_text("do not lose me")
    before = tree(root)
    assert "holds no export of ours" in refusal(capfd, [*words, "--hf_save_path", "mine"])
    assert tree(root) == before
    convert = ["convert", "--convert_to_hf", "--load", "exports", "--hf_save_path"]
    assert "holds no export of ours" in refusal(capfd, [*convert, "mine"])
    assert "the export would replace the checkpoint" in refusal(capfd, [*convert, "exports"])
    assert main([*convert, "exports/hf"]) == 0
    assert not (root / "exports" / ".hf.old").exists()


def test_an_export_to_a_mount_point_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="is a mount point"):
        check_export_folder(
            Path("/proc/sys/fs/binfmt_misc") if os.path.ismount("/proc/sys/fs/binfmt_misc") else Path("/")
        )


def test_a_failing_removal_of_an_old_checkpoint_leaves_the_new_one(root, capfd, monkeypatch):
    rename = os.rename

    def refused(source, target):
        if Path(source).name == "iter_0000001":
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    assert main(train_words("model", "rows.json", "pruned", save_interval=1, save_total_limit=1)) == 0
    assert "an old checkpoint could not be removed: [Errno 13] Permission denied" in capfd.readouterr().err
    assert (root / "pruned" / "iter_0000002" / "manifest.json").is_file()


def test_the_home_folder_and_relative_names(root, capfd, monkeypatch):
    monkeypatch.setenv("HOME", str(root / "home"))
    words = train_words("model", "rows.json", "~/run", use_lora=True, lora_rank=2, convert_to_hf=True)
    assert main(words) == 0
    saved = root / "home" / "run"
    assert json.loads((saved / "hf" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        root / "model"
    )
    monkeypatch.chdir(root / "home")
    assert main(["convert", "--convert_to_hf", "--merge", "--load", "~/run", "--hf_save_path", "merged"]) == 0
    assert (root / "home" / "merged" / "model.safetensors").is_file()


# --- tokens


def bigger_tokenizer(folder: Path, model: Path) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"new{i}" for i in range(100)])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_with_more_tokens_than_the_model(root, capfd):
    folder = bigger_tokenizer(root / "tokenizer", root / "model")
    write_rows(root / "new.json", [{**row, "output": "new99"} for row in alpaca_rows(8)])
    words = train_words("model", "new.json", "big", tokenizer_model="tokenizer")
    err = refusal(capfd, words)
    assert "tokenizer" in err and "'new99'" in err and "the model's vocabulary ends at" in err
    assert not Path("big").exists()
    # rows without the new tokens train; checkpoint and export have the tokenizer of the run
    assert main(train_words("model", "rows.json", "fits", tokenizer_model="tokenizer", convert_to_hf=True)) == 0
    for place in ("fits/hf", "fits/iter_0000002/hf_assets"):
        assert (root / place / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


# --- the place in the data


def test_another_batch_size_goes_on_with_the_next_sample(root, capfd):
    words = train_words("model", "rows.json", "batches", global_batch_size=8, train_iters=2)
    assert main(words) == 0
    capfd.readouterr()
    assert main(train_words("model", "rows.json", "batches", global_batch_size=16, train_iters=3)) == 0
    out = capfd.readouterr().out
    assert "changed   train.global_batch_size: 8 in the checkpoint, 16 now" in out
    manifests = [json.loads((root / "batches" / f"iter_000000{n}" / "manifest.json").read_text()) for n in (2, 3)]
    assert [manifest["consumed_samples"] for manifest in manifests] == [16, 32]
    # 16 + 16 samples are the first 32 of the epoch: the unbroken run at 16 sees the same
    assert main(train_words("model", "rows.json", "unbroken", global_batch_size=16, train_iters=2)) == 0
    assert loss_lines(root / "batches")[2]["supervised_tokens"] == loss_lines(root / "unbroken")[1]["supervised_tokens"]


def test_an_adapter_does_not_go_on_at_another_scale(root, capfd):
    assert main(train_words("model", "rows.json", "scaled", use_lora=True, lora_rank=2, lora_alpha=4)) == 0
    words = train_words("model", "rows.json", "scaled", use_lora=True, lora_rank=2, lora_alpha=8, train_iters=4)
    assert "LoRA rank 2, alpha 4" in refusal(capfd, words)


# --- ranks and hosts


def data_missing_on_rank_1(save: str) -> Result:
    return in_rank(train_words("model", ("rows.json", "gone.json")[int(os.environ["RANK"])], save))


def test_what_one_rank_finds_wrong_ends_all(root, tmp_path):
    """As under srun, which leaves the other tasks running: the data is missing on the second rank's node."""
    first, second = run_distributed(data_missing_on_rank_1, 2, str(tmp_path / "out"))
    assert (first.code, second.code) == (2, 2)
    assert "gone.json: no such file" in first.err and "(seen by rank 1)" in first.err
    assert second.err == ""
    assert not (tmp_path / "out").exists()


def test_a_host_that_validates_nothing_gets_the_same_errors(root):
    from primus_bridge.adapter import MegatronBridgeAdapter
    from primus_bridge.megatron import parallel

    adapter = MegatronBridgeAdapter()
    params = {"stage": "sft", "hf_path": "model", "data_path": "rows.json", "train_iters": 2, "global_batch_size": 4}
    for wrong, message in (
        ({}, "no place for the run"),
        ({"save": "host", "min_lr": 1.0}, "min_lr 1.0 must not be above"),
    ):
        arguments = adapter.convert_config({**params, **wrong})
        adapter.prepare_backend(arguments)
        trainer = adapter.load_trainer_class("sft")(backend_args=arguments, module_world_size=1)
        try:
            with pytest.raises(ConfigError, match=message):
                trainer.run()
        finally:
            parallel.leave()
    assert not Path("host").exists()


def test_a_cpu_run_where_gpu_packages_are_installed(root, tmp_path):
    """transformer_engine and apex bind to a GPU at import: a run on the CPU does not import them."""
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('no GPU here')")
    words = [*train_words("model", "rows.json", tmp_path / "out"), "--device", "cpu"]
    done = run(*words, cwd=root, env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})
    assert done.code == 0, done.err
