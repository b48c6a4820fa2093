"""`primus quickstart` for real, in a short form: every file it promises, and the folders it refuses."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from primus_bridge.cli.main import main
from primus_bridge.quickstart.run import prepare_folder
from tests.cli.command import run


@pytest.mark.slow
def test_the_whole_road(tmp_path):
    save = tmp_path / "a folder: # 1"
    done = run("quickstart", "--save", str(save), "--train_iters", "8", timeout=280)
    assert done.code == 0, done.err
    result = json.loads((save / "quickstart.json").read_text())
    assert 0 <= result["exact_match_before"] < 0.05 and 0 <= result["exact_match_after"] <= 1
    assert result["seconds"] > 0 and result["tokens_per_second"] > 0
    assert result["hf_folder"] == str(save / "hf")
    AutoModelForCausalLM.from_pretrained(result["hf_folder"])
    AutoTokenizer.from_pretrained(result["hf_folder"])
    assert (save / "loss.png").is_file()
    history = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert max(losses) == 8
    assert "exact match" in done.out

    # the file it leaves is a run of its own
    words = ("train", "--framework", "megatron_bridge", "--config", str(save / "quickstart.yaml"), "--dry_run")
    assert main(list(words)) == 0


def test_another_folder_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, said = main(["quickstart", "--save", str(tmp_path)]), capsys.readouterr()
    assert code == 2 and str(tmp_path) in said.err and "Traceback" not in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_earlier_quickstart_is_replaced_and_nothing_else(tmp_path):
    prepare_folder(tmp_path / "new")
    (tmp_path / "new" / "quickstart.yaml").touch()
    for name in ("iter_0000900", "hf", "my_notes"):
        (tmp_path / "new" / name).mkdir()
        (tmp_path / "new" / name / "file").touch()
    (tmp_path / "new" / "metrics.jsonl").touch()
    prepare_folder(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["my_notes", "quickstart.yaml"]


@pytest.mark.parametrize("words", (("--train_iters", "0"), ("--nproc", "3"), ("--train_itres", "5")))
def test_bad_options_are_refused(tmp_path, words):
    done = run("quickstart", "--save", str(tmp_path / "new"), *words)
    assert done.code == 2 and words[0] in done.err
    assert not (tmp_path / "new").exists()


def test_ranks_of_another_job_are_refused(tmp_path):
    done = run("quickstart", "--save", str(tmp_path / "new"), env={"RANK": "0", "WORLD_SIZE": "2"})
    assert done.code == 2 and "torchrun" in done.err
    assert not (tmp_path / "new").exists()
