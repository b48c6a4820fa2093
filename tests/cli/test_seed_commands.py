"""The documented commands and YAML of the backend, word for word: paths and sizes aside, nothing is changed.

What follows a documented command makes it small enough for a test; a tiny model lies where the hub's name would.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from primus_bridge.adapter import MegatronBridgeAdapter
from primus_bridge.cli.main import main
from primus_bridge.config import load_arguments
from primus_bridge.registry import BackendRegistry
from tests.cli.command import JOB, ROOT, Result
from tests.cli.example import alpaca_rows, loss_lines, save_model, workplace, write_rows
from tests.documented import LORA_YAML, SFT_YAML

SFT = """
primus train \\
    --framework megatron_bridge \\
    --config configs/megatron_bridge/llama_sft_posttrain.yaml \\
    --load /path/to/pretrained/checkpoint \\
    --data_path /path/to/instruction/data
"""
LORA = """
primus train \\
    --framework megatron_bridge \\
    --config configs/megatron_bridge/llama_lora_posttrain.yaml \\
    --use_lora \\
    --lora_rank 16 \\
    --lora_alpha 32
"""
FROM_HF = """
primus train \\
    --framework megatron_bridge \\
    --convert_from_hf \\
    --hf_model_name_or_path meta-llama/Llama-3-8B \\
    --data_path /path/to/instruction/data \\
    --lr 5e-6 \\
    --train_iters 5000
"""
EXPORT = """
# Export after training (or specify convert_to_hf in config)
python -m primus.cli.convert \\
    --framework megatron_bridge \\
    --load /path/to/finetuned/checkpoint \\
    --hf_save_path /path/to/output/hf_model \\
    --convert_to_hf
"""
PARALLELISM_YAML = """
parallelism:
  tensor_model_parallel_size: 1-2  # Less than pre-training
  pipeline_model_parallel_size: 1  # Often not needed
"""
# no data set is divided, no page written, no large batch made: what a test need not wait for
SMALL = "--train_iters 2 --global_batch_size 2 --seq_length 64 --lr_warmup_iters 0 --report false"
SCRIPT = ROOT / "examples" / "run_megatron_bridge.sh"


def words(command: str, small: str = "", **paths: Path | str) -> list[str]:
    """The documented command's words; ``paths`` stand for its /path/to ones, ``small`` follows."""
    lines = "\n".join(line for line in command.splitlines() if not line.startswith("#"))
    for documented, path in paths.items():
        lines = lines.replace(f"/path/to/{documented.replace('__', '/')}", str(path))
    assert "/path/to" not in lines
    return [*shlex.split(lines.replace("\\\n", " ")), *shlex.split(small)]


def primus(command: list[str]) -> Result:
    assert command[0] == "primus"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command[1:])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with meta-llama/Llama-3-8B, data, and the checkpoint that the documentation starts from."""
    with workplace(tmp_path_factory.mktemp("seed")) as folder:
        save_model(folder / "meta-llama" / "Llama-3-8B")
        write_rows(folder / "data.json", alpaca_rows(16))
        made = primus(shlex.split("primus convert --convert_from_hf --hf_model_name_or_path model --save base"))
        assert made.code == 0, made.err
        yield folder


def ran(save: Path, result: Result) -> None:
    assert result.code == 0, result.err
    assert [line["step"] for line in loss_lines(save)][-1] == 2


def test_sft_from_a_checkpoint(place):
    paths = {"pretrained__checkpoint": "base", "instruction__data": "data.json"}
    dry = primus(words(SFT, "--dry_run --seq_length 64", **paths))
    assert dry.code == 0, dry.err
    table = {line.split("  ")[0]: line for line in dry.out.splitlines()}
    assert " 128 " in table["train.global_batch_size"] and " 5000 " in table["train.train_iters"]
    assert "configs/megatron_bridge/llama_sft_posttrain.yaml is the example of that name" in dry.out
    ran(place / "sft", primus(words(SFT, SMALL + " --save sft --validation_split 0 --eval_interval null", **paths)))


def test_a_config_that_is_neither_there_nor_an_example(place):
    result = primus(["primus", "train", "--config", "configs/megatron_bridge/llama_stf_posttrain.yaml"])
    assert result.code == 2
    assert "no such file; the examples are " in result.err
    assert "did you mean 'llama_sft_posttrain.yaml'?" in result.err


def test_from_hugging_face_and_export(place):
    paths = {"instruction__data": "data.json"}
    assert primus(words(FROM_HF, "--dry_run", **paths)).code == 0
    ran(place / "tuned", primus(words(FROM_HF, SMALL + " --save tuned", **paths)))
    command = words(EXPORT, finetuned__checkpoint="tuned", output__hf_model="out/hf_model")
    assert command[:3] == ["python", "-m", "primus.cli.convert"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", command[2:])
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(place / "out/hf_model"))


def test_lora_with_the_documented_yaml(place):
    config = place / "configs" / "megatron_bridge" / "llama_lora_posttrain.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(LORA_YAML.replace("/path/to/instruction/data", "data.json"))
    try:
        result = primus(words(LORA, SMALL + " --save lora --convert_to_hf"))
    finally:
        shutil.rmtree(place / "configs")
    ran(place / "lora", result)
    adapter = json.loads((place / "lora/hf/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 32, 0.05)
    assert sorted(adapter["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_the_documented_sft_yaml_with_its_lora(place):
    text = SFT_YAML.replace("/path/to/pretrained/checkpoint", "base").replace("/path/to/instruction/data", "data.json")
    (place / "sft.yaml").write_text(text.replace("/path/to/finetuned/checkpoints", "yaml_run"))
    command = ["primus", "train", "--framework", "megatron_bridge", "--config", "sft.yaml", *SMALL.split()]
    ran(place / "yaml_run", primus(command))
    written = yaml.safe_load((place / "yaml_run" / "run.yaml").read_text())
    assert (written["optimizer"]["min_lr"], written["peft"]["scheme"], written["peft"]["dim"]) == (5e-7, "lora", 16)


def test_a_range_is_a_choice(place):
    (place / "range.yaml").write_text("framework: megatron_bridge\n" + PARALLELISM_YAML)
    result = primus(["primus", "train", "--config", "range.yaml"])
    assert result.code == 2
    assert "range.yaml:4: 'parallelism.tensor_model_parallel_size' must be a whole number" in result.err
    assert "a range: choose one, such as 1" in result.err


@pytest.mark.parametrize("template", ["alpaca", "chatml", "llama2"])
@pytest.mark.parametrize("dataset_format", ["alpaca", "dolly", "oasst", "sharegpt", "custom"])
def test_documented_formats_and_templates_are_known(dataset_format, template):
    arguments = load_arguments(None, ["--dataset_format", dataset_format, "--prompt_template", template])
    assert (arguments.dataset.dataset_format, arguments.dataset.prompt_template) == (dataset_format, template)


def test_the_documented_registry(monkeypatch):
    class MegatronPretrainTrainer: ...

    class MegatronSFTTrainer: ...

    monkeypatch.setattr(BackendRegistry, "_trainers", dict(BackendRegistry._trainers))
    BackendRegistry.register_trainer_class(MegatronPretrainTrainer, "megatron")  # stage="pretrain" (default)
    BackendRegistry.register_trainer_class(MegatronSFTTrainer, "megatron", "sft")  # stage="sft"
    adapter = MegatronBridgeAdapter("megatron")
    assert adapter.load_trainer_class() is MegatronPretrainTrainer
    assert adapter.load_trainer_class(stage="sft") is MegatronSFTTrainer
    assert BackendRegistry.get_trainer_class("megatron", stage="pretrain") is MegatronPretrainTrainer


def script(*arguments: str, **variables: str) -> Result:
    """``bash run_megatron_bridge.sh ...`` without a terminal."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment(**variables), stdin=subprocess.DEVNULL, capture_output=True
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in JOB}
    return kept | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]]), **variables}


def in_menu(answers: str, **variables: str) -> Result:
    """The script on a terminal of its own, with what is typed there."""
    terminal, end = pty.openpty()
    child = subprocess.Popen(["bash", str(SCRIPT)], env=environment(**variables), stdin=end, stdout=end, stderr=end)
    os.close(end)
    os.write(terminal, answers.encode())
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    return Result(child.wait(), shown.decode(errors="replace"), "")


def test_script_says_how(place):
    told = script("--help")
    assert told.code == 0
    for word in ("sft", "hf", "lora", "export", "MODEL", "CHECKPOINT", "DATA", "SAVE", "HF_SAVE"):
        assert f" {word} " in told.out
    assert script("stf").code == script().code == 2
    assert "unknown mode 'stf': sft, hf, lora or export" in script("stf").err
    nowhere = script("hf", PATH="/usr/bin:/bin")
    assert nowhere.code == 2 and "the command primus is not there" in nowhere.err


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_script_is_clean():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("mode", ["sft", "hf"])
def test_script_modes(place, mode):
    paths = {"CHECKPOINT": "base", "MODEL": "meta-llama/Llama-3-8B", "DATA": "data.json"}
    done = script(mode, "--seq_length", "64", "--dry_run", **paths)
    assert done.code == 0, done.err
    assert " --data_path data.json " in done.out and f" --save output/{mode} " in done.out
    table = {line.split("  ")[0]: line for line in done.out.splitlines()}
    assert "5e-06" in table["optimizer.lr"] and " 5000 " in table["train.train_iters"]
    assert not (place / "output").exists()


def test_script_runs_lora_and_its_menu_exports(place):
    done = script(
        "lora", *SMALL.split(), "--save_merged_model", "false", MODEL="model", DATA="data.json", SAVE="by_name"
    )
    ran(place / "by_name", done)
    assert (place / "by_name/hf/adapter_model.safetensors").is_file()
    menu = in_menu("7\n4\nby_name\n\n")
    assert menu.code == 0, menu.out
    assert "there is no '7'" in menu.out and "CHECKPOINT [output/hf]: " in menu.out
    assert (place / "by_name/hf_export/adapter_model.safetensors").is_file()
    assert in_menu("q\n").code == 0
