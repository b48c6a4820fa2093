"""primus convert from outside: which flags go together; the conversions themselves are tested in tests/conversion."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from primus_bridge.cli.main import guarded, main
from primus_bridge.conversion.families import families
from tests import family_models
from tests.cli.command import in_rank, run, torchrun
from tests.distributed.harness import run_distributed
from tests.distributed.test_round_trip import tensors


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "give one direction"),
        ("--convert_from_hf --convert_to_hf", "give one direction"),
        ("--convert_from_hf --save c", "--convert_from_hf needs --hf_model_name_or_path"),
        ("--convert_from_hf", "needs --hf_model_name_or_path and --save"),
        ("--convert_to_hf --load c", "--convert_to_hf needs --hf_save_path"),
        (
            "--convert_from_hf --hf_model_name_or_path h --save c --merge",
            "--merge has no meaning with --convert_from_hf",
        ),
        ("--convert_to_hf --load c --hf_save_path o --save s", "--save has no meaning with --convert_to_hf"),
        ("--convert_to_hf --load c --hf_save_path o --merge --adapter_only", "contradict each other"),
        ("--convert_to_hf --load c --hf_save_path o --expert_model_parallel_size 0", "must be above 0, got 0"),
        (
            "--convert_from_hf --hf_model_name_or_path h --save c --tensor_model_parallel_size 0",
            "must be above 0, got 0",
        ),
        ("--convert_from_hf --hf_model_name_or_path h --save c --tensor_model_parallel_size two", "invalid int value"),
        ("--convert_to_hf --load c --hf_save_path o --dtype int4", "invalid choice: 'int4'"),
        ("--convert_to_hf --lod c", "unknown option '--lod' - did you mean '--load'?"),
        ("--framework nemo --convert_to_hf --load c --hf_save_path o", "unknown framework 'nemo'"),
        ("--adapter p --hf_model_name_or_path h --save c", "p: no such adapter folder"),
        ("--convert_to_hf --load ./gone --hf_save_path o", "gone"),
        ("--convert_from_hf --hf_model_name_or_path ./gone --save c", "gone"),
    ],
)
def test_user_errors(tmp_path, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = guarded(lambda: main(["convert", *words.split()]))
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert message in said.err
    assert said.err.startswith("primus: ")
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_both_names_are_one_command(tmp_path):
    listed = run("--list", module="primus.cli.convert", cwd=tmp_path)
    assert listed.code == 0
    assert {line.split()[0] for line in listed.out.splitlines()} >= {"llama", "qwen2", "qwen3"}
    assert run("convert", "--list", cwd=tmp_path).out == listed.out


def test_ranks_of_a_job_convert_together_and_say_an_error_once(tmp_path, monkeypatch):
    folder = Path(family_models.save("mixtral", tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    words = "convert --convert_from_hf --hf_model_name_or_path hf --save ckpt --expert_model_parallel_size=2"
    first, second = run_distributed(in_rank, 2, words.split())
    assert (first.code, first.out) == (0, "converted hf -> ckpt/iter_0000000 (float32)\n"), first.err
    assert (second.code, second.out) == (0, ""), second.err
    words = "convert --framework megatron_bridge --load ckpt --convert_to_hf --hf_save_path out"
    assert main(words.split()) == 0
    want, got = tensors(folder), tensors(tmp_path / "out")
    assert set(want) == set(got) and all(torch.equal(got[name], value) for name, value in want.items())
    words = "--framework megatron_bridge --load ckpt --convert_to_hf --hf_save_path o --tensor_model_parallel_size=3"
    refused = torchrun(*words.split(), module="primus.cli.convert", cwd=tmp_path, env={"GLOO_SOCKET_IFNAME": "lo"})
    said = [line for line in refused.err.splitlines() if line.startswith("primus: ")]
    assert refused.code != 0 and len(said) == 1 and "3 does not divide num_attention_heads 8" in said[0]


def test_the_list_names_every_family(capsys):
    assert main(["convert", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(families())
    assert next(line for line in lines if line.startswith("mixtral")).endswith(
        "TP PP SP CP DP EP  LoRA: q_proj k_proj v_proj o_proj"
    )


def test_a_checkpoint_that_its_run_removes_meanwhile(tmp_path, capsys, monkeypatch):
    from primus_bridge.megatron import dist_checkpoint

    family_models.save("llama", tmp_path / "hf")
    words = f"convert --framework megatron_bridge --convert_from_hf --hf_model_name_or_path {tmp_path}/hf"
    assert main([*words.split(), "--save", str(tmp_path / "ckpt")]) == 0
    load = dist_checkpoint.load_sharded

    def removed_first(folder, *args, **options):
        shutil.rmtree(tmp_path / "ckpt" / "iter_0000000")
        return load(folder, *args, **options)

    monkeypatch.setattr(dist_checkpoint, "load_sharded", removed_first)
    words = f"convert --framework megatron_bridge --load {tmp_path}/ckpt --convert_to_hf --hf_save_path {tmp_path}/out"
    assert guarded(lambda: main(words.split())) == 2
    assert "was removed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
