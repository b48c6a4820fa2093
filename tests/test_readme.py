"""The commands and configs of README.md, as written: names of models and data stand for tiny ones, training is dry.

What a first reader types must not be refused. The two commands at its top are run by .ci/run.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from primus_bridge.cli.main import main
from tests.cli.command import ROOT
from tests.cli.example import alpaca_rows, save_model, train_words, workplace, write_rows

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = ("meta-llama/Llama-3.2-1B", "Qwen/Qwen3-8B", "gpt2", "HF_DIR", "HF_DIR_OR_ID")
ELSEWHERE = {
    "pip install": ".ci/run",
    "pytest": ".ci/run",
    "primus quickstart": ".ci/run",
    "bash examples/run_megatron_bridge.sh": "tests/cli/test_seed_commands.py",
    "python examples/train_sft.py": "tests/sft",
    "export PYTHONPATH=": "tests/integrations",
    "script=": "tests/integrations",
    "primus-cli": "tests/integrations",
    "python -m primus_bridge.integrations.primus": "tests/integrations",
    "tests/bridge/make_environment": ".ci/run",
    "sbatch": "tests/launch/test_slurm.py",
    "primus verify --hf HF_DIR --tensor_model_parallel_size": "tests/verify",
    "primus checkpoint diff": "tests/cli/test_checkpoint_command.py",
    "python -m tests.reliability.kill_resume": "tests/reliability/test_kill_resume.py",
}
"""What a command begins with -> where it is run."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command of every bash block, in the order of the page, on one line and without comments."""
    found = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s+)# .*$", "", line).strip()
            if line:
                found.append(re.sub(r"\s+", " ", line))
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the commands name: models, data, the run.yaml of the page, a run, an adapter."""
    with workplace(tmp_path_factory.mktemp("readme")) as desk:
        for name in MODELS:
            save_model(desk / name)
        write_rows(desk / "my_alpaca.json", alpaca_rows(400))
        (desk / "tatsu-lab" / "alpaca").mkdir(parents=True)
        write_rows(desk / "tatsu-lab" / "alpaca" / "train.json", alpaca_rows(40))
        (desk / "examples").symlink_to(ROOT / "examples")
        whole = next(block for block in blocks("yaml") if block.startswith("framework:"))
        (desk / "run.yaml").write_text(whole)
        assert main(train_words("HF_DIR", "my_alpaca.json", "runs/first")) == 0
        lora = train_words("HF_DIR", "my_alpaca.json", "LORA_CKPT", use_lora=True, lora_rank=4, convert_to_hf=True)
        assert main(lora) == 0
        (desk / "PEFT_DIR").symlink_to(desk / "LORA_CKPT" / "hf")
        yield desk


def tried(command: str) -> list[str] | None:
    """The words after ``primus`` with which the command is tried; None for what is tried elsewhere."""
    command = re.sub(r"^(?:[A-Z0-9_]+=\S+ )+(?=\S)", "", command.split(" && ")[-1])
    if any(command.startswith(start) for start in ELSEWHERE):
        return None
    words = shlex.split(command)
    if "--engine" in words:
        return None  # tests/bridge, where Megatron-Bridge is
    if words[:2] == ["python", "-m"] and words[2] == "primus.cli.convert":
        return ["convert", *words[3:]]
    if words[0] == "python" and words[1].startswith("tests/benchmarks/"):
        assert (ROOT / words[1]).is_file()
        return None
    if "primus_bridge.cli.main" in words:  # under torchrun or srun
        words = ["primus", *words[words.index("primus_bridge.cli.main") + 1 :]]
    assert words[0] == "primus", f"a command that this test does not know: {command}"
    dry = words[1] in ("train", "submit") and "--dry_run" not in words
    return [*words[1:], "--dry_run"] if dry else words[1:]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme(desk, command, capfd):
    words = tried(command)
    if words is not None:
        code = main(words)
        assert code == 0, capfd.readouterr().err


def test_state_of_ones_own_is_saved_and_read(desk):
    class EMA:
        """Counts how often it was saved."""

        saved, loaded = 0, None

        def state_dict(self):
            self.saved += 1
            return {"saved": self.saved}

        def load_state_dict(self, state):
            EMA.loaded = state

    block = next(block for block in blocks("python") if "state_components" in block)
    for steps in (2, 3):
        config = {"base_model": "HF_DIR", "dataset_name": "my_alpaca.json", "dataset_format": "alpaca"}
        config |= {"output_dir": "runs/ema", "max_steps": steps, "save_steps": 1, "convert_to_hf": False}
        Path("sft.yaml").write_text(yaml.safe_dump(config | {"batch_size": 1, "max_seq_length": 64}))
        assert EMA.loaded is None
        exec(block, {"EMA": EMA, "__name__": "mine"})
        assert (desk / f"runs/ema/iter_000000{steps}/state/ema.rank_00000.pt").is_file()
    assert EMA.loaded == {"saved": 2}


def test_each_config_of_the_readme_is_understood(desk):
    from primus_bridge.config import load_arguments

    for number, block in enumerate(blocks("yaml")):
        if block.startswith(("system:", "work_group:")):  # a template of one's own
            continue
        (desk / f"block{number}.yaml").write_text(block)
        load_arguments(str(desk / f"block{number}.yaml"), [], None)
