"""Bad input: one message on stderr that says what and where, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from primus_bridge.cli.main import main
from tests.cli.example import alpaca_rows, train_words, tree, workplace, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model and data."""
    with workplace(tmp_path_factory.mktemp("bad_input")) as root:
        write_rows(root / "rows.json", alpaca_rows(16))
        yield root


def words_of(**options) -> list[str]:
    return train_words(options.pop("model", "model"), options.pop("data", "rows.json"), "out", **options)


# --- the configuration


@pytest.mark.parametrize(
    "text, parts",
    [
        ("lora_rnak: 8\n", ["config.yaml:1:", "unknown key 'lora_rnak'", "did you mean 'lora_rank'?"]),
        ("training:\n  lr: fast\n", ["config.yaml:2:", "'training.lr' must be a number", "'fast'"]),
        ("training:\n  train_iters: 2.5\n", ["config.yaml:2:", "'training.train_iters' must be a whole number"]),
        ("training:\n  lr: [1\n  b: 2\n", ["config.yaml:"]),
        ("training: {lr: 1\n", ["config.yaml:"]),
        ("- a\n- b\n", ["config.yaml"]),
    ],
    ids=["unknown key", "wrong type", "a fraction", "malformed YAML", "unclosed YAML", "a list"],
)
def test_configuration(place, refused, text, parts):
    (place / "config.yaml").write_text(text)
    refused([*words_of(), "--config", "config.yaml"], *parts)


def test_missing_files(refused):
    refused([*words_of(), "--config", "gone.yaml"], "gone.yaml: no such file")
    refused(words_of(data="gone.jsonl"), "gone.jsonl: no such file or folder", "data_path")
    refused(words_of(model="./gone"), "./gone: no such model folder")


# --- the data


@pytest.mark.parametrize(
    "text, parts",
    [
        (
            '{"instruction": "a", "input": "", "output": "b"}\n{"instruction": "a",\n',
            ["rows.jsonl:2:", "malformed JSON"],
        ),
        ("", ["rows.jsonl: the data set is empty"]),
        ("\n\n", ["rows.jsonl: the data set is empty"]),
        (
            '{"instruction": "a", "input": "", "output": "1"}\n{"instruction": "a", "input": ""}\n',
            ["rows.jsonl:2:", "'output'"],
        ),
        ('{"text": "plain"}\n', ["rows.jsonl"]),
        ("7\n", ["rows.jsonl:1:", "must be an object"]),
        ('{"instruction": "\\ud800", "output": "b"}\n', ["rows.jsonl:1", "'instruction'", "half of a surrogate pair"]),
    ],
    ids=["malformed", "no rows", "blank lines", "no answer", "plain text", "a number", "half a character"],
)
def test_data(place, refused, text, parts):
    (place / "rows.jsonl").write_text(text)
    refused(words_of(data="rows.jsonl"), *parts)


def test_a_conversation_without_an_answer(place, refused):
    write_rows(place / "chat.jsonl", [{"messages": [{"role": "user", "content": "say 1"}]}] * 4)
    refused(words_of(data="chat.jsonl"), "chat.jsonl: the train set is empty: of 4 rows none is left (4 no answer)")


def test_every_token_masked_is_said_once_by_two_ranks(place, refused):
    # too long to fit: nothing of the answers is left to learn from
    write_rows(place / "long.json", [{"instruction": "say", "input": "", "output": " ".join(["1"] * 80)}] * 4)
    options = {"data": "long.json", "tensor_model_parallel_size": 2}
    refused(
        words_of(**options), "long.json: the train set is empty", "4 longer than seq_length", "raise model.seq_length"
    )


def test_a_chat_template_that_fails(place, refused):
    shutil.copytree(place / "model", "talks")
    Path("talks/chat_template.jinja").write_text("{% for i in range(10000000) %}x{% endfor %}")
    turns = [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "1"}]
    write_rows(place / "chat.jsonl", [{"messages": turns}] * 4)
    refused(words_of(model="talks", data="chat.jsonl"), "chat template refuses these turns", "Range too big")


def test_no_tokenizer(place, refused):
    shutil.copytree("model", place / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(words_of(model="mute"), "mute: the folder holds no tokenizer")


# --- the layout


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"tensor_model_parallel_size": 3}, ["tensor_model_parallel_size 3 does not divide num_attention_heads 8"]),
        ({"tensor_model_parallel_size": 16}, ["tensor_model_parallel_size 16 does not divide num_attention_heads 8"]),
        ({"expert_model_parallel_size": 2}, ["expert_model_parallel_size: the model has no experts to share out"]),
        ({"pipeline_model_parallel_size": 3}, ["pipeline_model_parallel_size 3 does not divide the model's 4 layers"]),
        ({"tensor_model_parallel_size": 2, "nproc": 3}, ["3 ranks do not divide", "--nproc 4"]),
        ({"nproc": 3}, ["global_batch_size 4 must be a multiple of"]),
        ({"micro_batch_size": 3}, ["global_batch_size 4 must be a multiple of micro_batch_size 3"]),
    ],
)
def test_layout(refused, options, parts):
    refused(words_of(**options), *parts)


# --- the model folder


@pytest.fixture
def broken(place):
    """A copy of the model to break."""
    return Path(shutil.copytree("model", place / "broken"))


def change_tensors(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_no_weights(broken, refused):
    (broken / "model.safetensors").unlink()
    refused(words_of(model="broken"), "broken: the model folder has no weights")
    (broken / "pytorch_model.bin").write_bytes(b"x")
    refused(words_of(model="broken"), "broken/pytorch_model.bin: truncated or not a PyTorch weights file")


@pytest.mark.parametrize("keep", [4, 200, -1000], ids=["in the length", "in the header", "in the data"])
def test_truncated_weights(broken, refused, keep):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(words_of(model="broken"), "broken/model.safetensors: ", "truncated")


def test_tensors_are_named(broken, refused):
    import torch

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(3)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)

    change_tensors(broken, change)
    refused(
        words_of(model="broken", tensor_model_parallel_size=2),
        "1 missing tensors: model.layers.1.mlp.up_proj.weight",
        "1 unexpected tensors: model.layers.9.mlp.up_proj.weight",
        "model.norm.weight is [3], config.json makes it [64]",
        "lm_head.weight is torch.int32",
    )


def test_unsupported_architecture(broken, refused):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    refused(words_of(model="broken"), "broken/config.json: ", "'mamba'", "llama", "qwen2", "qwen3")
    (broken / "config.json").write_text("{")
    refused(words_of(model="broken"), "broken/config.json:1: malformed JSON")
    (broken / "config.json").unlink()
    refused(words_of(model="broken"), "broken: not a Hugging Face model folder: it has no config.json")


def test_a_hub_id_that_cannot_be_had(refused):
    refused(words_of(model="nobody/nothing-of-the-kind"), "nobody/nothing-of-the-kind: is neither a folder here nor")


def test_unknown_lora_target(refused):
    words = [*words_of(use_lora=True), "--lora_target_modules", "q_porj,v_proj"]
    refused(words, "unknown target module 'q_porj' - did you mean 'q_proj'?", "gate_proj")


# --- where it writes


def test_save_folder_that_cannot_be(place, refused):
    refused([*words_of(), "--save", "x" * 300], "the save folder cannot be: File name too long")
    refused([*words_of(), "--save", "rows.json/out"], "the save folder cannot be a folder", "rows.json is a file")
    refused([*words_of(), "--save", "rows.json"], "rows.json is a file")
    refused([*words_of(), "--save", "/proc/primus_bridge"], "/proc/primus_bridge: ", "cannot")
    refused([*words_of(convert_to_hf=True), "--hf_save_path", "model/config.json/hf"], "config.json is a file")
    (place / "letters").mkdir()
    (place / "letters" / "dear.txt").write_text("diary")
    refused(
        [*words_of(convert_to_hf=True), "--hf_save_path", "letters"],
        "letters: is not empty and holds no export of ours",
    )


@pytest.fixture
def small_disk(tmp_path_factory):
    """small_disk(size): a file system of so much, such as 64k."""
    disk = tmp_path_factory.mktemp("disk")

    def make(size: str) -> Path:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting a tmpfs needs root")
        return disk

    yield make
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


def test_read_only_file_system(place, refused, small_disk):
    disk = small_disk("64k")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    refused([*words_of(), "--save", str(disk / "out")], f"{disk / 'out'}: the save folder cannot be written")


@pytest.mark.parametrize(
    "size, ranks, what",
    [
        ("1536k", 1, "a checkpoint"),
        ("1536k", 2, "a checkpoint"),
        ("1960k", 1, "a checkpoint"),
        ("16k", 1, "the run's files"),
    ],
)
def test_full_disk(place, refused, small_disk, size, ranks, what):
    disk = small_disk(size)
    words = [*words_of(tensor_model_parallel_size=ranks, convert_to_hf=True), "--save", str(disk / "out")]
    message = refused(words, f"cannot write {what}: No space left on device")
    assert str(disk / "out") in message
    left = [name for name in tree(disk) if "iter_" in name or "partial" in name or "/hf" in name or "latest" in name]
    assert left == []


@pytest.mark.parametrize(
    "options",
    [{}, {"use_lora": True, "lora_rank": 64}, {"pipeline_model_parallel_size": 2}],
    ids=["model", "adapter", "PP2"],
)
def test_full_disk_for_the_export(place, small_disk, capfd, options):
    disk = small_disk("256k")
    words = [*words_of(convert_to_hf=True, **options), "--hf_save_path", str(disk / "hf")]
    code, err = main(words), capfd.readouterr().err  # PP2: both stages write, and both fail
    assert code == 2
    # a whole model's size is known before anything is written
    why = (
        "cannot write the adapter export: No space left on device" if "use_lora" in options else "the export needs 0.00"
    )
    assert err.startswith(f"primus: {disk / 'hf'}: {why}")
    assert err.count("\n") == 1
    assert tree(disk) == {}
    assert (place / "out" / "iter_0000002" / "manifest.json").is_file()  # the training is not lost


# --- numbers that are none


def test_training_that_diverges(place, capfd):
    shutil.copytree(place / "model", "nan")
    from safetensors.torch import load_file, save_file

    tensors = load_file("nan/model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, "nan/model.safetensors", metadata={"format": "pt"})
    assert main(words_of(model="nan")) == 2
    err = capfd.readouterr().err
    assert err.startswith("primus: training diverged at step 1 (loss nan, gradient norm nan)") and err.count("\n") == 1
    assert not list((place / "out").glob("iter_*"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"num_hidden_layers": -4}, "num_hidden_layers is -4; expected a positive whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_parameters": "llama3"}, "rope_parameters is 'llama3'; expected an object"),
        ({"rope_parameters": {"rope_theta": "a"}}, "rope_theta is 'a'"),
        ({"model_type": ["llama"]}, "unsupported architecture: model_type ['llama']"),
    ],
)
def test_config_json_with_wrong_values(place, refused, changes, message):
    shutil.copytree(place / "model", "odd")
    config = json.loads(Path("odd/config.json").read_text())
    Path("odd/config.json").write_text(json.dumps({**config, **changes}))
    refused(words_of(model="odd"), "odd/config.json: ", message)
