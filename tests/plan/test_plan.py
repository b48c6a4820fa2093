"""``primus plan``: a 70B from its config.json, what fits and what does not, suggestions to paste, the data."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from primus_bridge.cli.main import main
from primus_bridge.config import load_arguments
from primus_bridge.plan.device import Device
from primus_bridge.plan.plan import make_plan
from tests.cli.example import alpaca_rows, train_words, workplace, write_rows
from tests.plan.released import RELEASED

LLAMA_70B = "meta-llama/Meta-Llama-3.1-70B"


@pytest.fixture
def big(tmp_path, monkeypatch):
    """A folder with nothing but the config.json of a model of 70 billion parameters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(RELEASED[LLAMA_70B][1]))
    return ["--hf_model_name_or_path", "model", "--seq_length", "4096", "--precision", "bf16_mixed"]


LAYOUT = ["--tensor_model_parallel_size", "8", "--pipeline_model_parallel_size", "4", "--sequence_parallel"]


def planned(words: list[str], code: int = 0) -> dict:
    assert main(["plan", *words, "--json", "plan.json"]) == code
    with open("plan.json") as file:
        return json.load(file)


def test_a_70b_that_fits(big, capsys):
    plan = planned([*big, *LAYOUT, "--gpu_memory", "80GB", "--global_batch_size", "32", "--train_iters", "100"])
    assert plan["fits"] and plan["suggestions"] == []
    assert plan["model"]["parameters"] == RELEASED[LLAMA_70B][0]
    assert (plan["layout"]["world_size"], plan["layout"]["data"]) == (32, 1)
    assert [stage["chunks"][0]["layers"] for stage in plan["stages"]] == [
        list(range(start, start + 20)) for start in (0, 20, 40, 60)
    ]
    # a parameter of bf16: 2 bytes, its gradient in fp32 4, master weight and moments 12
    first = plan["stages"][0]
    assert first["weights"] * 2 == first["gradients"] and first["weights"] * 6 == first["optimizer"]
    # 1F1B: stage 0 holds four micro-batches, the last stage one
    kept = [stage["activations"] for stage in plan["stages"]]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    # the output layer is work too: the last stage holds up the others, in each of 32 micro-batches
    layer = 2 * 8192 * (8192 + 1024) + 3 * 8192 * 28672 + 2 * 8192 * 4096 // 2
    last = 20 * layer + 128256 * 8192
    assert plan["bubble"] == pytest.approx(1 - 32 * (80 * layer + 128256 * 8192) / 4 / (60 * layer + 32 * last))
    assert plan["slowest"] == pytest.approx(last / (20 * layer + 128256 * 2048))
    assert plan["steps"]["micro_batches"] == 32 and plan["steps"]["tokens"] == 100 * 32 * 4096
    assert plan["arguments"]["model.seq_length"] == {"value": 4096, "source": "command line --seq_length"}
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert any(line.startswith("  stage 0 ") and "embedding + 0-19" in line for line in lines)
    assert any(line.startswith("  stage 3 ") and "60-79 + output" in line for line in lines)
    assert "fits" in told and "does not fit" not in told
    arguments = next(at for at, line in enumerate(lines) if line.startswith("arguments"))
    assert max(len(line) for line in lines[:arguments]) <= 80


UNEVEN = "--num_layers_in_first_pipeline_stage {} --num_layers_in_last_pipeline_stage {}"


def test_a_split_that_waits_less_is_told(big, capsys):
    words = [*big, *LAYOUT, "--gpu_memory", "80GB", "--global_batch_size", "64"]
    even = planned(words)
    assert even["better_split"] is None and "% with" not in capsys.readouterr().out
    uneven = planned([*words, *UNEVEN.format(1, 1).split()])
    # two stages of 39 layers each work while two of one layer wait
    assert uneven["bubble"] > 1 - 80 / (4 * 39) and uneven["slowest"] > 1.9
    better = uneven["better_split"]
    assert better["bubble"] <= even["bubble"]
    flags = UNEVEN.format(better["first"], better["last"])
    assert f"{100 * better['bubble']:.1f} % with {flags}" in capsys.readouterr().out
    pasted = planned([*words, *flags.split()])
    assert pasted["bubble"] == better["bubble"] and pasted["better_split"] is None
    # recompute is of the layers alone: the output layer holds up less
    assert planned([*words, "--recompute_granularity", "full"])["bubble"] < even["bubble"]


def test_states_that_are_offloaded_take_nothing_of_a_gpu(big):
    words = [*big, *LAYOUT, "--gpu_memory", "80GB"]
    usual, half, whole = (
        planned([*words, *more.split()])["stages"][0]
        for more in ("", "--optimizer_cpu_offload --optimizer_offload_fraction 0.5", "--optimizer_cpu_offload")
    )
    assert (half["optimizer"], whole["optimizer"]) == (usual["optimizer"] // 2, 0)
    assert whole["total"] == usual["total"] - usual["optimizer"]
    on_cpu = [*words[:-2], "--optimizer_cpu_offload", "--device", "cpu"]
    assert planned(on_cpu)["stages"][0]["optimizer"] == usual["optimizer"]


def test_suggestions_fit_when_they_are_pasted(big, capsys):
    """Each, behind the same command, gives a plan that fits, with the very number that was promised."""
    layout = ["--tensor_model_parallel_size", "8", "--pipeline_model_parallel_size", "2", "--world_size", "16"]
    words = [*big, *layout, "--gpu_memory", "80GB", "--global_batch_size", "64"]
    plan = planned(words)
    assert not plan["fits"] and len(plan["suggestions"]) == 3
    told = capsys.readouterr().out
    for suggestion in plan["suggestions"]:
        assert suggestion["flags"] in told
        again = planned([*words, *shlex.split(suggestion["flags"])])
        assert again["fits"], suggestion
        assert max(stage["total"] for stage in again["stages"]) == suggestion["total"]
        assert again["layout"]["world_size"] == suggestion["world_size"]
        # primus train knows the same words
        assert load_arguments(None, [*big, *shlex.split(suggestion["flags"])]).dist.nproc in (
            None,
            suggestion["world_size"],
        )
    assert {"--nproc" in suggestion["flags"] for suggestion in plan["suggestions"]} == {True, False}


def test_the_last_of_two_counts(big):
    Path("run.yaml").write_text("nproc: 4\n")
    words = [*big, "--config", "run.yaml", "--gpu_memory", "80GB", "--gpu_memory=900GB"]
    assert planned(words)["layout"]["world_size"] == 4
    plan = planned([*words, "--world_size", "8"])
    assert plan["layout"]["world_size"] == 8 and plan["device"]["total"] == 900 * 10**9
    assert plan["arguments"]["dist.nproc"] == {"value": 8, "source": "command line --nproc"}
    assert planned([*words, "--world-size=8", "--nproc", "2"])["layout"]["world_size"] == 2
    assert planned([*words, "--nproc", "2", "--world_size=8"])["layout"]["world_size"] == 8


def test_more_ranks_of_one_host_are_no_help(tmp_path):
    """They share its memory: what is suggested there keeps their number."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["meta-llama/Llama-3.2-3B"][1]))
    arguments = load_arguments(None, ["--hf_model_name_or_path", str(tmp_path), "--seq_length", "512"])
    plan = make_plan(arguments, 1, Device("cpu", 20 * 10**9, 19 * 10**9, "test"))
    assert not plan.fits and plan.suggestions
    assert {suggestion.world_size for suggestion in plan.suggestions} == {1}


def test_quantised_weights(big, capsys):
    """primus train refuses them too, once it has them; pretraining takes the shape alone."""
    config = {**RELEASED[LLAMA_70B][1], "quantization_config": {"quant_method": "fp8"}}
    Path("model/config.json").write_text(json.dumps(config))
    assert main(["plan", *big, "--gpu_memory", "80GB"]) == 2
    assert "model/config.json: the checkpoint is quantised (quantization_config)" in capsys.readouterr().err
    assert main(["plan", "pretrain", *big, "--gpu_memory", "80GB"]) == 0


def test_each_measure_saves_memory(big):
    base = [*big, *LAYOUT, "--gpu_memory", "80GB", "--micro_batch_size", "2", "--global_batch_size", "64"]

    def need(*words: str) -> int:
        return max(stage["total"] for stage in planned([*base, *words])["stages"])

    usual = need()
    for words in (
        ["--micro_batch_size", "1"],
        ["--recompute_granularity", "full"],
        ["--use_lora"],
        ["--world_size", "64"],
        ["--context_parallel_size", "2"],
        ["--recompute_granularity", "full", "--recompute_method", "block", "--recompute_num_layers", "4"],
    ):
        assert need(*words) < usual, words
    assert need("--sequence_parallel=false") > usual


def test_it_is_torchless_and_quick(big):
    """What a second is spent on is torch: a plan does not import it."""
    script = (
        "import sys; from primus_bridge.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'megatron', 'datasets'} & set(sys.modules); assert not heavy, heavy; "
        "sys.exit(code)"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", script, "plan", *big, *LAYOUT, "--gpu_memory", "80GB"], timeout=60)
    assert done.returncode == 0


def test_the_host_is_the_device_without_gpus(big, capsys):
    plan = planned([*big, "--device", "cpu", *LAYOUT])
    assert plan["device"]["kind"] == "cpu" and not plan["fits"]
    assert "--gpu_memory 80GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu_memory", "lots"], "--gpu_memory 'lots' is not a size; give one such as 80GB"),
        (["--gpu_memory", "80"], "--gpu_memory 80 is 80 bytes, less than any GPU has; give one such as 80GB"),
        (["--engine", "bridge"], "command line --engine: engine bridge takes other memory than is counted here"),
        (["--world_size", "none"], "--world_size must be a whole number above 0, got 'none'"),
        (["--world_size"], "--world_size must be a whole number above 0, got ''"),
        (["--world_size", "3", "--tensor_model_parallel_size", "2"], "3 ranks do not divide"),
        (["--tensor_model_parallel_size", "7"], "does not divide num_attention_heads 64"),
        (["--hf_model_name_or_path", "nowhere/"], "no such model folder"),
        (["--lora_rnak", "8"], "did you mean"),
        (["--data"], "no data: give data.data_path"),
        (["--json", "no/such/folder.json"], "there is no folder"),
    ],
)
def test_what_a_user_can_mend(big, capsys, words, told):
    assert main(["plan", *big, *words]) == 2
    assert told in capsys.readouterr().err


def test_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--seq_length", "128"]) == 2
    assert "no model: give hf_model_name_or_path" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "nothing to plan" in capsys.readouterr().err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("plan")) as folder:
        write_rows(folder / "data.json", alpaca_rows(40))
        yield folder


def test_data_is_counted_as_the_run_counts_it(place, capsys):
    """Sequences, epochs, tokens and the longest; then the run itself, whose ledger says the same."""
    train = train_words("model", "data.json", "out", seq_length=256, global_batch_size=4, train_iters=None)[1:]
    words = [*train, "--num_epochs", "1.5", "--device", "cpu", "--data"]
    plan = planned(words)
    assert plan["data"]["sequences"] == 40
    assert plan["steps"]["steps"] == 15 and plan["steps"]["epochs"] == pytest.approx(1.5)
    assert 0 < plan["data"]["longest"] < 256
    assert plan["steps"]["tokens_per_step"] == pytest.approx(4 * plan["data"]["tokens"] / 40)
    told = capsys.readouterr().out
    assert "40 sequences" in told and "15 x" in told
    without = planned([word for word in words if word != "--data"])
    assert without["data"] is None and without["steps"]["steps"] is None
    # sequences of seq_length would take more
    assert without["stages"][0]["activations"] > plan["stages"][0]["activations"]
    assert main(["train", *train, "--num_epochs", "1.5", "--device", "cpu"]) == 0
    ledger = json.loads((place / "out" / "ledger.json").read_text())
    assert ledger["sequences"]["count"] == 40
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 15
    assert sum(line["tokens"] for line in steps) == pytest.approx(plan["steps"]["tokens"], rel=0.1)


def test_a_run_that_may_not_fit_says_so_first(place, capfd):
    """Sequences as long as seq_length would need terabytes; those of the data do not, so it runs."""
    words = train_words("model", "data.json", "long", seq_length=2**30, device="cpu", train_iters=1)
    assert main(words) == 0
    told = capfd.readouterr().out
    assert "note: a rank may need" in told and "`primus plan` says what to change" in told
    assert told.index("note: a rank may need") < told.index("step")


def test_help_and_list_of_commands(capsys):
    assert main(["plan", "--help"]) == 0
    assert "--gpu_memory" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "plan " in capsys.readouterr().out
