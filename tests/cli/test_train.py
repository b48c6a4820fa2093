"""primus train from outside: dry run, exit code 2 with one message and nothing written."""

from __future__ import annotations

import json

import pytest

from primus_bridge.cli.main import main
from tests import tiny_models
from tests.cli.command import JOB, MEETING, in_rank, run, torchrun
from tests.distributed.harness import run_distributed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tiny_models.save("llama", folder)
    words = {word: index for index, word in enumerate(["<unk>", "</s>", *map(str, range(200))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    rows = [{"instruction": f"say {i}", "input": "", "output": str(i)} for i in range(16)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "config.yaml").write_text(
        "framework: megatron_bridge\n"
        "convert_from_hf: true\n"
        f"hf_model_name_or_path: {model}\n"
        "training:\n"
        "  global_batch_size: 8\n"
        "  lr: 5e-6\n"
        "data:\n"
        "  data_path: rows.json\n"
        "checkpointing:\n"
        "  save: out\n"
    )
    return tmp_path


def test_dry_run_prints_every_argument_with_its_source_and_writes_nothing(config):
    result = run("train", "--config", "config.yaml", "--dry_run", "--clip_grad", "0.5", cwd=config)
    assert (result.code, result.err) == (0, "")
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in result.out.splitlines()}
    assert lines["optimizer.lr"] == ["5e-06", "config.yaml:6"]
    assert lines["optimizer.clip_grad"] == ["0.5", "command line --clip_grad"]
    assert lines["optimizer.adam_eps"] == ["1e-08", "default"]
    assert lines["stage"] == ["sft", "default"]
    assert lines["train.eval_interval"] == ["null", "default"]
    assert sorted(entry.name for entry in config.iterdir()) == ["config.yaml", "rows.json"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "gone.yaml"], "primus: gone.yaml: no such file\n"),
        (
            ["--config", "config.yaml", "--lora_rnak", "8"],
            "primus: command line --lora_rnak: unknown key 'lora_rnak' at the top level - did you mean 'lora_rank'?\n",
        ),
        (["posttrian", "--config", "config.yaml"], "primus: unknown stage 'posttrian'"),
        (["--config"], "primus: --config needs a value"),
        (
            ["--config", "config.yaml", "--exp", "other.yaml"],
            "primus: --config config.yaml and --exp other.yaml are two names of one option: keep one\n",
        ),
        (
            ["--exp", "config.yaml", "--backend_path", "/x"],
            "primus: command line --backend_path: 'backend_path' cannot be '/x': Megatron-Core is the one that is",
        ),
        (
            ["--exp", "config.yaml", "--export_config", "all.yaml"],
            "primus: command line --export_config: 'export_config' cannot be 'all.yaml': --dry_run prints the merged",
        ),
        ([], "primus: nothing to train: give --config FILE.yaml"),
        (["--config", "config.yaml", "--framework", "nemo"], "primus: command line --framework: 'framework' must be"),
        (["--config", "config.yaml", "--lr", "0"], "primus: command line --lr: lr 0.0 must be above 0\n"),
        (
            ["--config", "config.yaml", "--tensor_model_parallel_size", "2", "--nproc", "3"],
            "primus: 3 ranks do not divide into copies of the model of 2 (tensor 2 x pipeline 1)",
        ),
        (["--config", "config.yaml", "--nproc", "3"], "must be a multiple of micro_batch_size x data-parallel ranks"),
        (["--config", "config.yaml", "--data_path", "gone.json"], "gone.json"),
        (["--config", "config.yaml", "--hf_model_name_or_path", "./gone"], "gone"),
    ],
)
def test_user_errors(config, words, message, capfd):
    code, said = main(["train", *words]), capfd.readouterr()
    assert (code, said.out) == (2, "")
    assert message in said.err
    assert said.err.startswith("primus: ")
    assert "Traceback" not in said.err
    assert not (config / "out").exists()


def test_dry_run_checks_the_files_too(config, capsys):
    assert main("train --config config.yaml --data_path gone.json --dry_run".split()) == 2
    assert "gone.json" in capsys.readouterr().err


def test_stage_words(config, capsys):
    for stage, expected, option in (("posttrain", "sft", "--exp"), ("pretrain", "pretrain", "--config")):
        assert main(["train", stage, option, "config.yaml", "--dry_run"]) == 0
        assert f"stage {expected} command line {stage}" in " ".join(capsys.readouterr().out.split())


def test_ranks_of_torchrun_join_and_say_an_error_once(config):
    words = ["train", "--config", "config.yaml", "--data_path", "gone.json"]
    result = torchrun(*words, cwd=config)
    ours = sorted(line for line in result.err.splitlines() if line.startswith("primus: "))
    assert result.code != 0
    assert len(ours) == 1 and ours[0].startswith("primus: gone.json: no such file or folder")
    assert not (config / "out").exists()


def test_a_job_that_does_not_fit_the_layout(config, monkeypatch, capsys):
    job = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert main("train --config config.yaml --tensor_model_parallel_size 2".split()) == 2
    assert capsys.readouterr().err.startswith("primus: 3 ranks do not divide into copies of the model of 2")


def test_a_world_of_one_without_a_master(config):
    words = "train --config config.yaml --train_iters 1".split()
    result = run_distributed(in_rank, 1, words, ("LOCAL_RANK", *MEETING))[0]
    assert result.code == 0, result.err
