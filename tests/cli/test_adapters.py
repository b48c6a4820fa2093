"""A PEFT adapter through the commands: in, out, merged, trained further, killed and started again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import peft
import pytest

from primus_bridge.checkpoint.manifest import read_manifest
from primus_bridge.cli.main import main
from tests import peft_adapters
from tests.cli.command import run
from tests.cli.example import alpaca_rows, loss_lines, save_model, train_words, workplace, write_rows

CONVERT = "convert --framework megatron_bridge"
IN = f"{CONVERT} --hf_model_name_or_path model"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder to stand in: model/, rows.json, adapters of the model, and ckpt/: patterns/, read by two ranks."""
    with workplace(tmp_path_factory.mktemp("adapters")) as root:
        write_rows(root / "rows.json", alpaca_rows(24))
        for folder, name in (("patterns", "llama, patterns"), ("dora", "llama, some layers")):
            peft_adapters.add(name, str(root / "model"), str(root / folder))
        (root / "patterns" / "tokenizer_config.json").write_text((root / "model/tokenizer_config.json").read_text())
        (root / "patterns" / "tokenizer.json").write_text((root / "model/tokenizer.json").read_text())
        (root / "patterns" / "chat_template.jinja").write_text("{{ messages }}")
        done = run(*f"{IN} --adapter patterns --save ckpt --tensor_model_parallel_size 2".split(), env=dict(os.environ))
        assert (done.code, done.err) == (0, ""), done.err
        assert "converted patterns on model -> ckpt/iter_0000000 (float32)" in done.out
        yield root


def tensors(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> None:
    import torch

    mine, theirs = tensors(one), tensors(other)
    assert set(mine) == set(theirs)
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    mine, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other))
    assert mine == theirs | {"base_model_name_or_path": str(Path("model").absolute())}


def merged_logits(folder: str):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(2, 42)[None]).logits


def adapted_logits(folder: str):
    import torch

    return peft_adapters.logits("model", folder, torch.arange(2, 42)[None])[1]


def test_out_again_and_merged(root):
    import torch

    assert main(f"{CONVERT} --load ckpt --convert_to_hf --hf_save_path again".split()) == 0
    same(root / "again", root / "patterns")
    assert (root / "again" / "chat_template.jinja").read_text() == "{{ messages }}"  # the adapter's own
    assert main(f"{CONVERT} --load ckpt --convert_to_hf --hf_save_path merged --merge".split()) == 0
    torch.testing.assert_close(merged_logits("merged"), adapted_logits("patterns"), rtol=0, atol=1e-5)
    assert json.loads((root / "ckpt/iter_0000000/manifest.json").read_text())["base"] == str(root / "model")


def test_in_another_dtype(root):
    import torch

    assert main(f"{IN} --adapter dora --save half --dtype bf16".split()) == 0
    assert main(f"{CONVERT} --load half --convert_to_hf --hf_save_path half_again".split()) == 0
    for key, value in tensors(root / "dora").items():
        assert torch.equal(tensors(root / "half_again")[key], value.to(torch.bfloat16)), key


def test_another_base_and_its_dtype(root, capfd):
    """A wide adapter on narrow weights: merged in full precision, written as the base is."""
    import torch
    from transformers import AutoModelForCausalLM

    save_model(root / "narrow", dtype=torch.bfloat16)
    words = f"{CONVERT} --hf_model_name_or_path narrow --adapter dora --save narrow_ckpt".split()
    assert main(words) == 2
    assert "was trained on" in (err := capfd.readouterr().err) and "add --allow_other_base" in err
    assert main([*words, "--allow_other_base"]) == 0
    assert main(f"{CONVERT} --load narrow_ckpt --convert_to_hf --merge --hf_save_path narrow_out".split()) == 0
    base = AutoModelForCausalLM.from_pretrained("narrow", dtype=torch.float32)
    want = peft.PeftModel.from_pretrained(base, "dora").merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained("narrow_out").state_dict()
    for key, value in got.items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), want[key], rtol=2**-8, atol=1e-6)


def test_a_base_whose_weights_are_damaged_or_not_here(root, capfd):
    weights = shutil.copytree(root / "model", root / "broken") / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    words = f"{CONVERT} --hf_model_name_or_path broken --adapter dora --allow_other_base --save over_broken".split()
    assert main(words) == 2
    assert "broken/model.safetensors: truncated: " in capfd.readouterr().err
    assert not (root / "over_broken").exists()
    weights.unlink()
    assert main(words) == 0
    assert read_manifest(root / "over_broken" / "iter_0000000").base_digest is None


@pytest.mark.parametrize("adapter", ["patterns", "dora"])
def test_trained_further_and_started_again(root, adapter, capfd):
    import torch

    checkpoint = "ckpt" if adapter == "patterns" else "dora_ckpt"
    if adapter == "dora":
        assert main(f"{IN} --adapter dora --save dora_ckpt".split()) == 0
    options = dict(use_lora=True, convert_from_hf=None, hf_model_name_or_path=None, load=checkpoint)
    options |= dict(convert_to_hf=True, save_merged_model=True, train_iters=3, save_interval=2)
    words = train_words("model", "rows.json", f"{adapter}_run", **options)
    assert main(words) == 0
    said = capfd.readouterr().out
    assert f"the adapter of {checkpoint}/iter_0000000" in said
    assert ("rsLoRA rank 4, alpha 8 on" if adapter == "patterns" else "DoRA rank 2, alpha 8 on") in said
    hf = root / f"{adapter}_run" / "hf"
    before, after = tensors(root / adapter), tensors(hf)
    assert set(before) == set(after)
    assert all((before[key] - after[key]).abs().max() > 0 for key in before)
    torch.testing.assert_close(merged_logits(str(hf / "merged")), adapted_logits(str(hf)), rtol=0, atol=1e-5)
    # the first step starts from the adapter: a fresh one of the same shape has another loss
    steps = loss_lines(root / f"{adapter}_run")
    fresh = options | dict(load=None, convert_from_hf=True, hf_model_name_or_path="model", train_iters=1)
    assert main(train_words("model", "rows.json", f"{adapter}_fresh", **fresh)) == 0
    assert abs(loss_lines(root / f"{adapter}_fresh")[0]["loss"] - steps[0]["loss"]) > 1e-3
    # the same command again goes on with the run, from a checkpoint whose adapter is of that odd shape
    again = [word if word != "3" else "4" for word in words]
    capfd.readouterr()
    assert main(again) == 0
    assert f"continuing {adapter}_run/iter_0000003 at step 3" in capfd.readouterr().out
    assert [line["step"] for line in loss_lines(root / f"{adapter}_run")] == [1, 2, 3, 4]
    # and so does its run.yaml, into another folder from step 0
    assert main(["train", "--config", f"{adapter}_run/run.yaml", "--save", f"{adapter}_yaml"]) == 0
    assert loss_lines(root / f"{adapter}_yaml")[0]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{IN} --adapter patterns", "--adapter needs --save"),
        (f"{CONVERT} --adapter patterns --save c", "--adapter needs --hf_model_name_or_path"),
        (f"{IN} --adapter patterns --save c --merge", "--merge has no meaning with --adapter"),
        (f"{IN} --convert_from_hf --save c --allow_other_base", "--allow_other_base has no meaning with --convert_"),
        (f"{IN} --adapter gone --save c", "primus: gone: no such adapter folder"),
        (f"{IN} --adapter model --save c", "primus: model: not a PEFT adapter folder"),
        (
            f"{CONVERT} --adapter patterns --hf_model_name_or_path dora --save c",
            "dora: holds a PEFT adapter, not a model",
        ),
        (
            f"{IN} --adapter patterns --save c --tensor_model_parallel_size 0",
            "--tensor_model_parallel_size must be above 0, got 0",
        ),
    ],
)
def test_refused(root, words, message, capfd):
    assert main(words.split()) == 2
    err = capfd.readouterr().err
    assert message in err and err.startswith("primus: ") and err.count("\n") == 1
    assert not (root / "c").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora_rank=64), "holds another adapter (rsLoRA rank 4, alpha 8 on "),
        (
            dict(use_lora=None),
            "holds only a LoRA adapter, not the weights of a model; train it further with --use_lora",
        ),
        (dict(lora_target_modules="q_proj"), "asks for: target_modules ['q_proj']"),
    ],
)
def test_another_run_than_the_adapter(root, options, message, capfd):
    words = dict(use_lora=True, convert_from_hf=None, load="ckpt", hf_model_name_or_path=None) | options
    assert main(train_words("model", "rows.json", "never", **words)) == 2
    assert message in capfd.readouterr().err
    assert not (root / "never").exists()
