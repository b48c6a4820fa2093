"""SFTTrainer on real runs: the losses of the command line, live callbacks, several ranks, epochs, the example."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from primus_bridge import CheckpointCallback, SFTConfig, SFTTrainer, ValidationCallback
from primus_bridge.cli.main import main
from primus_bridge.config import read_run_yaml
from primus_bridge.errors import ConfigError
from primus_bridge.launch.local import launch_function
from tests.cli.command import JOB
from tests.cli.example import alpaca_rows, loss_lines, workplace, write_rows
from tests.distributed.harness import run_distributed
from tests.sft.in_ranks import Notebook, raise_in_rank, train_in_rank

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_sft.py"

CONFIG = dict(
    base_model="model",
    dataset_name="rows.json",
    dataset_format="alpaca",
    validation_split=0.25,
    use_lora=True,
    use_qlora=False,
    lora_r=4,
    batch_size=1,
    gradient_accumulation_steps=4,
    num_epochs=2,
    warmup_steps=1,
    learning_rate=1e-3,
    max_seq_length=64,
    save_merged_model=True,
    report_to="none",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder to stand in: model/, rows.json (12 to train on), sft.yaml; and cli/: its run by the command line."""
    with workplace(tmp_path_factory.mktemp("sft")) as root:
        write_rows(root / "rows.json", alpaca_rows(16))
        (root / "sft.yaml").write_text(yaml.safe_dump(CONFIG))
        assert main("train --config sft.yaml --save cli".split()) == 0
        yield root


def losses(save: Path) -> list[float]:
    return [line["loss"] for line in loss_lines(save)]


def test_the_same_numbers_as_the_command_line(root):
    validation = ValidationCallback(eval_steps=2)
    config = SFTConfig.from_yaml("sft.yaml", report=True)
    callbacks = [validation, CheckpointCallback(output_dir="api", save_steps=4)]
    result = SFTTrainer(config, callbacks=callbacks).train()
    assert losses(root / "api") == losses(root / "cli") and len(losses(root / "api")) == 6
    lines = [json.loads(line) for line in (root / "api" / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(evaluations) == [2, 4, 6]
    assert result["train_loss"] == pytest.approx(sum(losses(root / "api")) / 6)
    assert result["eval_loss"] == evaluations[6]
    assert result["best_eval_loss"] == min(evaluations.values()) == validation.best.loss  # the very object
    assert result["best_step"] == validation.best.step
    assert (result["steps"], result["step"], result["stop_reason"]) == (6, 6, None)
    assert result["tokens"] == sum(line["tokens"] for line in lines if "loss" in line) and result["seconds"] > 0
    assert (result["save_folder"], result["checkpoint"]) == ("api", "api/iter_0000006")
    assert sorted(path.name for path in (root / "api").glob("iter_*")) == ["iter_0000004", "iter_0000006"]
    assert result["hf_folder"] == result["adapter_folder"] == "api/hf"
    for file in ("hf/adapter_model.safetensors", "hf/tokenizer.json", "hf/merged/model.safetensors"):
        assert (root / "api" / file).read_bytes() == (root / "cli" / file).read_bytes()
    assert result["merged_folder"] == "api/hf/merged" and result["report"] == "api/report.html"
    assert config.arguments.checkpoint.save.startswith("runs/")  # the caller's config stays as it was


def test_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root / "home"))
    here = CheckpointCallback(output_dir="~/run", save_steps=2)
    config = SFTConfig.from_yaml("sft.yaml", max_steps=2, convert_to_hf=False, save_merged_model=False, report=False)
    assert SFTTrainer(config, callbacks=[here]).train()["save_folder"] == str(root / "home" / "run")
    again = SFTConfig.from_yaml("sft.yaml", max_steps=2, output_dir="~/run")
    here.check(again.arguments)  # the same folder, written the same way
    assert not (root / "~").exists()


def test_two_ranks_and_their_callbacks(root, capfd):
    config = SFTConfig.from_yaml("sft.yaml", nproc=2, gradient_accumulation_steps=2, output_dir="two", report=False)
    result = SFTTrainer(config, callbacks=[Notebook("notes.txt")]).train()
    assert losses(root / "two") == pytest.approx(losses(root / "cli"), rel=1e-5)  # 1 x 2 x 2 ranks, as 1 x 4 x 1
    assert result["train_loss"] == pytest.approx(sum(losses(root / "two")) / 6) and result["steps"] == 6
    notes = (root / "notes.txt").read_text().split()
    assert notes == ["start", "1", "2", "3", "4", "5", "6", "end"]  # by one rank
    assert "data 2 = 2 ranks" in capfd.readouterr().out


def test_ranks_of_somebody_elses_job(root):
    overrides = dict(tensor_model_parallel_size=2, output_dir="joined", report=False)
    first, second = run_distributed(train_in_rank, 2, "sft.yaml", overrides)
    assert first == second and first["steps"] == 6
    assert losses(root / "joined") == pytest.approx(losses(root / "cli"), rel=1e-5)
    assert (root / "joined.txt").read_text().split()[-1] == "end"


def test_errors_of_spawned_ranks(root, capfd):
    refused = RuntimeError("no such luck")
    with pytest.raises(RuntimeError, match="the run of 2 ranks failed with exit code 1"):
        launch_function(raise_in_rank, (refused, 1), 2)
    told = capfd.readouterr().err
    assert "RuntimeError: no such luck" in told and "primus: rank 1 failed" in told
    with pytest.raises(ConfigError, match="^here: mend this$"):
        launch_function(raise_in_rank, (ConfigError("mend this", where="here"), 0), 1)


def test_what_cannot_be_sent_to_the_ranks_is_said_before(root):
    config = SFTConfig.from_yaml("sft.yaml", nproc=2, gradient_accumulation_steps=2, output_dir="unsent")
    notebook = Notebook("notes.txt")
    notebook.file = open(os.devnull)
    with pytest.raises(ConfigError, match="Notebook cannot be sent to the ranks .*define it at the top"):
        SFTTrainer(config, callbacks=[notebook]).train()
    notebook.file.close()
    with pytest.raises(ConfigError, match="int is no Callback"):
        SFTTrainer(config, callbacks=[3]).train()
    assert not (root / "unsent").exists()


def test_epochs_are_counted_and_run_again(root, capfd):
    written = read_run_yaml(root / "cli" / "run.yaml")
    assert (written.train.num_epochs, written.train.train_iters, written.train.global_batch_size) == (2.0, 6, 4)
    assert written.sources["train.train_iters"] == "follows num_epochs 2 of 12 sequences"
    assert main("train --config cli/run.yaml --save longer --load cli --num_epochs 2.5 --report false".split()) == 0
    out = capfd.readouterr().out
    assert "continuing cli/iter_0000006 at step 6" in out and "steps 6 to 8 of 4 samples, 2.5 epochs" in out
    assert "changed   train.train_iters: 6 in the checkpoint, 8 now" in out
    assert [line["step"] for line in loss_lines(root / "longer")] == [7, 8]
    # the number of steps is known after the data only, and then the schedule is checked
    code = main("train --config sft.yaml --save warm --warmup_steps 6".split())
    assert (code, capfd.readouterr().err) == (
        2, "primus: command line --warmup_steps: lr_warmup_iters 6 must be below train_iters 6 "
        "(follows num_epochs 2 of 12 sequences): set lr_warmup_iters\n",
    )  # fmt: skip
    assert not (root / "warm").exists()


def test_the_example_script(root, capfd, monkeypatch):
    words = "--config sft.yaml --no-wandb --patience 5".split()
    config = yaml.safe_load(Path("sft.yaml").read_text())
    Path("sft.yaml").write_text(
        yaml.safe_dump(config | {"eval_steps": 3, "wandb_project": "p", "output_dir": "script"})
    )
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert losses(root / "script") == losses(root / "cli")
    assert "over 6 steps; exported to script/hf" in capfd.readouterr().out
    assert not (root / "script" / "wandb").exists()
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--config", "none.yaml"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 2 and "none.yaml: no such file" in capfd.readouterr().err


def test_a_script_without_a_guard_is_told(root):
    (root / "bare.py").write_text(
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'torch': print('torch at', os.environ.get('TORCH_CPP_LOG_LEVEL'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from primus_bridge import SFTConfig, SFTTrainer\n"
        "SFTTrainer(SFTConfig(base_model='model', dataset_name='rows.json', output_dir='bare', nproc=2)).train()\n"
    )
    variables = {name: value for name, value in os.environ.items() if name not in JOB}
    variables.pop("TORCH_CPP_LOG_LEVEL", None)
    done = subprocess.run([sys.executable, "bare.py"], capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 1
    assert 'put the call of train() under if __name__ == "__main__":' in done.stderr.splitlines()[-1]
    assert not (root / "bare").exists()
    # nor do torch's warnings for its developers reach anybody
    assert set(done.stdout.splitlines()) == {"torch at ERROR"}
