"""primus verify from outside: exit codes, table, JSON, and what a user can have wrong."""

from __future__ import annotations

import json
import re

import pytest

from primus_bridge.cli.main import main
from tests import family_models
from tests.cli.command import MEETING, in_rank, run
from tests.distributed.harness import run_distributed
from tests.verify.released import RELEASED


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    return family_models.save("gpt2", tmp_path_factory.mktemp("verify") / "gpt2")


def released(name: str, folder, **changes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RELEASED[name] | changes))
    return str(folder)


def test_equal_shrunk_on_two_ranks(tmp_path):
    folder = released("qwen3-30b-a3b", tmp_path / "moe")
    words = "--shrink --tensor_model_parallel_size 2 --batch 2 --seq-length 64 --device cpu --json out.json".split()
    result = run("verify", "--hf", folder, *words, cwd=tmp_path)
    assert (result.code, result.err) == (0, ""), result.out + result.err
    assert "qwen3_moe, shrunk to 2 layers" in result.out and "\x1b" not in result.out
    assert "tensor 2 on 2 ranks, fp32, 2 x 64 tokens, tolerance 1.4e-05" in result.out
    assert "note: sequence parallelism is on" in result.out
    rows = re.findall(r"^(\S.*?) {2,}(\d\.\de[-+]\d+) +(\d\.\de[-+]\d+) {2}(\w+)", result.out, re.M)
    names = ["embedding", "layer 0", "layer 1", "final norm", "logits", "loss", "gradients"]
    assert [row[0] for row in rows] == names and {row[3] for row in rows} == {"ok"}
    assert result.out.splitlines()[-1] == "equal: every relative error is at most 1.4e-05"
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["equal"] and report["first"] is None and report["shrunk"] and report["model_type"] == "qwen3_moe"
    assert report["layout"] | {"ranks": 2} == dict(
        tensor=2, pipeline=1, expert=1, expert_tensor=2, sequence_parallel=True, ranks=2
    )
    assert [stage["stage"] for stage in report["stages"]] == names
    assert set(report["stages"][1]["parts"]) == {"attention", "mlp"}
    assert f"{report['stages'][-1]['relative_error']:.1e}" == rows[-1][2]
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in report["gradients"]
    # nothing else is left: the model that was made is gone
    assert {path.name for path in tmp_path.iterdir()} == {"moe", "out.json"}


def test_different_in_a_job_of_one(tmp_path, gpt2):
    """The job that torchrun would start; --tolerance of nothing makes rounding a difference."""
    words = ["verify", "--hf", gpt2, "--tolerance", "1e-12", "--device", "cpu", "--batch", "2"]
    result = run_distributed(in_rank, 1, words, MEETING)[0]
    assert result.code == 1, result.out + result.err
    assert re.search(r"^layer 0 .*DIFFERS", result.out, re.M)
    assert re.search(
        r"^DIFFERS first at layer 0, in its (attention|MLP) \(relative error .*transformer\.h\.0\.", result.out, re.M
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ("--shrink", "which model? give --hf"),
        ("--hf ./gone", "./gone: no such model folder"),
        ("--hf {llama}", "the model folder has no weights"),
        ("--hf {other}", "unsupported architecture: model_type 'lama'"),
        ("--hf {other} --shrink", "did you mean 'llama'"),
        ("--hf {llama} --shrink --tensor_model_parallel_size 3", "3 does not divide num_attention_heads 32"),
        ("--hf {llama} --shrink --expert_model_parallel_size 2", "the model has no experts"),
        ("--hf {llama} --shrink --tensor_model_parallel_size 2 --nproc 3", "3 ranks do not divide"),
        ("--hf {llama} --shrink --nproc 2 --batch 3", "--batch 3 does not divide over 2 data-parallel ranks"),
        ("--hf {gpt2} --pipeline_model_parallel_size 3", "does not divide the model's 4 layers"),
        ("--hf {gpt2} --seq_length 300", "the model has 256 learned positions"),
        ("--hf {gpt2} --against {gpt2} --shrink", "keep one of the two"),
        ("--hf {llama} --shrink --json gone/out.json", "there is no folder"),
        ("--hf {llama} --shrink --json .", "is a folder"),
        ("--hf {llama} --shrink --tolerance 0", "--tolerance must be above 0, got 0"),
        ("--hf {llama} --shrink --tensor_model_parallel_size 0", "must be above 0, got 0"),
        ("--hf {llama} --shrink --nproc 0", "--nproc must be above 0, got 0"),
        ("--hf {llama} --shrnk", "unknown option '--shrnk' - did you mean '--shrink'?"),
        ("--hf {llama} --dtype fp8", "invalid choice: 'fp8'"),
    ],
)
def test_user_errors(words, message, tmp_path, gpt2, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = {
        "llama": released("llama-3.1-8b", tmp_path / "llama"),
        "other": released("llama-3.1-8b", tmp_path / "other", model_type="lama"),
        "gpt2": gpt2,
    }
    assert main(["verify", *words.format(**folders).split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("primus: ") and message in printed.err
    assert "Traceback" not in printed.err and {path.name for path in tmp_path.iterdir()} == {"llama", "other"}
