"""The public commands end to end: SFT, LoRA, pretraining, resume, conversion, torchrun, evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from primus.cli import convert
from primus_bridge.cli.main import main
from tests.cli.command import in_rank, run, torchrun
from tests.cli.example import alpaca_rows, loss_lines, train_words, tree, workplace, write_rows
from tests.distributed.harness import run_distributed

STEP_FIELDS = "step loss grad_norm lr supervised_tokens tokens tokens_per_second step_time memory".split()
STEP_FIELDS += [f"memory_{part}" for part in ("weights", "gradients", "optimizer", "activations", "buffers")]
# save at 4, 8 and 10
RUN = dict(train_iters=10, save_interval=4, save_total_limit=2, eval_interval=5, validation_data_path="held_out.json")
RUN |= dict(tensor_model_parallel_size=2, convert_to_hf=True, hf_save_interval=8, lr_warmup_iters=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder to stand in: model/, rows.json, held_out.json, and whole/: an unbroken run of ten steps at TP2."""
    with workplace(tmp_path_factory.mktemp("train")) as root:
        write_rows(root / "rows.json", alpaca_rows(30))
        write_rows(root / "held_out.json", alpaca_rows(43)[30:])  # 13: no batch size and no layout divides it
        write_rows(root / "text.jsonl", [{"text": " ".join(str((i * k) % 200) for k in range(50))} for i in range(8)])
        done = run(*train_words("model", "rows.json", "whole", **RUN), env=dict(os.environ))
        assert (done.code, done.err) == (0, ""), done.err
        (root / "whole.out").write_text(done.out)
        yield root


def files_equal(one: Path, other: Path) -> None:
    assert tree(one) == tree(other)
    for name, size in tree(one).items():
        assert size == -1 or (one / name).read_bytes() == (other / name).read_bytes(), name


def test_what_a_run_leaves(root):
    save = root / "whole"
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [list(line) for line in steps] == [STEP_FIELDS] * 10
    assert [line["step"] for line in steps] == list(range(1, 11))
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [5, 10]
    assert evaluations[0]["eval_loss"] > evaluations[1]["eval_loss"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000008", "iter_0000010"]
    assert not [name for name in tree(save) if "partial" in name]
    import yaml

    written = yaml.safe_load((save / "run.yaml").read_text())
    assert written["train"]["train_iters"] == 10
    assert written["sources"]["train.train_iters"] == "command line --train_iters"
    assert written["sources"]["optimizer.adam_eps"] == "default"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(save / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    assert events.Scalars("train/loss")[-1].value == pytest.approx(steps[-1]["loss"])
    assert "rows read" in (root / "whole.out").read_text() and "Warning" not in (root / "whole.out").read_text()


def test_export_is_a_model_and_what_convert_gives(root, capfd):
    words = "--framework megatron_bridge --load whole --convert_to_hf --hf_save_path converted".split()
    capfd.readouterr()
    assert convert.main(words) == 0
    assert capfd.readouterr().err == ""
    files_equal(root / "whole" / "hf", root / "converted")
    # what the run exported on its way is what convert makes of the checkpoint of that step
    middle = "--load whole/iter_0000008 --convert_to_hf --hf_save_path middle".split()
    assert main(["convert", "--framework", "megatron_bridge", *middle]) == 0
    files_equal(root / "whole" / "hf_iter_0000008", root / "middle")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(root / "converted")
    tokenizer = AutoTokenizer.from_pretrained(root / "converted")
    assert model.generate(**tokenizer("say 1", return_tensors="pt"), max_new_tokens=2).shape[1] == 4


def test_resume_at_another_layout_and_schedule(root):
    options = RUN | {"tensor_model_parallel_size": 1, "convert_to_hf": False}
    assert main([*train_words("model", "rows.json", "other", **options), "--load", "whole/iter_0000008"]) == 0
    got = loss_lines(root / "other")
    expected = loss_lines(root / "whole")[8:]
    assert [line["step"] for line in got] == [9, 10]
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert [line["lr"] for line in got] == [line["lr"] for line in expected]
    # a longer run: without lr_decay_iters the schedule is the one that the new train_iters makes from the start
    longer = options | {"train_iters": 20, "lr_decay_style": "linear", "lr_warmup_iters": 0, "eval_interval": None}
    assert main([*train_words("model", "rows.json", "longer", **longer), "--load", "whole"]) == 0
    got = loss_lines(root / "longer")
    assert [line["step"] for line in got] == list(range(11, 21))
    assert [line["lr"] for line in got] == pytest.approx([1e-3 * (1 - (line["step"] - 1) / 20) for line in got])


def test_run_yaml_runs_again(root):
    assert main(["train", "--config", "whole/run.yaml", "--save", "again", "--tensor_model_parallel_size", "1"]) == 0
    got, expected = ([line["loss"] for line in loss_lines(root / name)] for name in ("again", "whole"))
    assert got == pytest.approx(expected, rel=1e-5)


def exact_loss(folder: Path, root: Path) -> float:
    """The mean of -log p over all supervised tokens of held_out.json, one row at a time, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in json.loads((root / "held_out.json").read_text()):
        prompt = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
        )
        prefix, answer = tokenizer(prompt).input_ids, [*tokenizer(row["output"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prefix + answer])).logits[0].double()
        log_probs = logits.log_softmax(-1)[len(prefix) - 1 : -1]
        total -= float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum())
        count += len(answer)
    return total / count


def last_evaluation(save: Path) -> dict:
    return json.loads((save / "metrics.jsonl").read_text().splitlines()[-1])


def test_evaluation_is_the_exact_mean(root):
    options = dict(validation_data_path="held_out.json", convert_to_hf=True, micro_batch_size=2)
    assert main(train_words("model", "rows.json", "one", **options)) == 0
    assert last_evaluation(root / "one")["eval_loss"] == pytest.approx(exact_loss(root / "one" / "hf", root), rel=1e-5)
    assert last_evaluation(root / "whole")["eval_loss"] == pytest.approx(
        exact_loss(root / "whole" / "hf", root), rel=1e-5
    )


def test_torchrun_with_two_data_parallel_ranks(root):
    options = dict(validation_data_path="held_out.json", convert_to_hf=True, micro_batch_size=2)
    words = train_words("model", "rows.json", "joined", **options)
    done = torchrun(*words, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.code == 0, done.err
    assert "tensor 1 x pipeline 1 x data 2 = 2 ranks" in done.out
    assert done.out.count("layout ") == 1 and "Warning" not in done.err
    expected = exact_loss(root / "joined" / "hf", root)
    assert last_evaluation(root / "joined")["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_lora_adapter_and_merged(root):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = dict(use_lora=True, lora_rank=4, convert_to_hf=True, save_merged_model=True, lr="1e-2", train_iters=4)
    assert main(train_words("model", "rows.json", "lora", **options)) == 0
    hf = root / "lora" / "hf"
    convert = "convert --load lora --convert_to_hf".split()
    assert main([*convert, "--adapter_only", "--hf_save_path", "lora_adapter"]) == 0
    assert main([*convert, "--merge", "--hf_save_path", "lora_merged"]) == 0
    files_equal(hf / "merged", root / "lora_merged")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (hf / name).read_bytes() == (root / "lora_adapter" / name).read_bytes(), name
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(root / "model")
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, hf).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(hf / "merged")(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)
    assert (adapted - before).abs().max() > 1e-3


def test_pretraining_from_random_weights(root):
    words = train_words("model", "text.jsonl", "pre", convert_from_hf=None, train_iters=6, convert_to_hf=True)
    assert main(["train", "pretrain", *words[1:]]) == 0
    losses = [line["loss"] for line in loss_lines(root / "pre")]
    assert losses[0] == pytest.approx(5.3, abs=0.3) and losses[-1] < losses[0] - 0.1  # ln 203 = 5.3: it knows nothing
    assert (root / "pre" / "hf" / "model.safetensors").is_file()


def test_convert_in_then_train_from_the_checkpoint(root):
    import torch
    from safetensors.torch import load_file

    into = "convert --framework megatron_bridge --convert_from_hf --hf_model_name_or_path model".split()
    layout = "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2".split()
    for done in run_distributed(in_rank, 4, [*into, "--save", "ckpt", *layout]):
        assert (done.code, done.err) == (0, ""), done.err
    assert (root / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "0"
    options = dict(convert_from_hf=None, hf_model_name_or_path=None, load="ckpt", train_iters=10)
    options |= dict(lr_warmup_iters=2, convert_to_hf=True)
    assert main(train_words("model", "rows.json", "loaded", **options)) == 0
    got, expected = ([line["loss"] for line in loss_lines(root / name)] for name in ("loaded", "whole"))
    assert got == pytest.approx(expected, rel=1e-5)
    assert main([*into, "--save", "half", "--dtype", "bf16"]) == 0
    assert main("convert --load half --convert_to_hf --hf_save_path half_hf".split()) == 0
    source, half = load_file("model/model.safetensors"), load_file("half_hf/model.safetensors")
    assert set(source) == set(half)
    for name, tensor in source.items():
        assert torch.equal(half[name], tensor.to(torch.bfloat16)), name
    assert json.loads((root / "half_hf" / "config.json").read_text()).get("dtype", "bfloat16") == "bfloat16"
