"""primus convert from outside: which flags go together; the conversions themselves are tested in tests/conversion."""

from __future__ import annotations

import pytest

from tests.cli.command import run


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
def test_user_errors(tmp_path, words, message):
    result = run(*words.split(), module="primus.cli.convert", cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.startswith("primus: ")
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_both_names_are_one_command(tmp_path):
    listed = run("--list", module="primus.cli.convert", cwd=tmp_path)
    assert listed.code == 0
    assert {line.split()[0] for line in listed.out.splitlines()} >= {"llama", "qwen2", "qwen3"}
    assert run("convert", "--list", cwd=tmp_path).out == listed.out
