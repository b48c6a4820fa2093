"""The flat dialect: the documented examples word for word, aliases, sources, and everything it refuses."""

from __future__ import annotations

import pytest

from primus_bridge.config import describe, load_arguments, schema
from primus_bridge.config.flat import table
from primus_bridge.config.merge import Target
from tests.documented import LORA_YAML as LORA
from tests.documented import SFT_YAML as SFT


def test_documented_sft_example(write):
    arguments = load_arguments(write(SFT), [])
    assert arguments.stage == "sft"
    assert arguments.checkpoint.load == "/path/to/pretrained/checkpoint"
    assert (arguments.train.micro_batch_size, arguments.train.global_batch_size) == (1, 128)
    assert (arguments.train.train_iters, arguments.optimizer.lr, arguments.optimizer.min_lr) == (5000, 5e-6, 5e-7)
    peft = arguments.peft
    assert (peft.scheme, peft.dim, peft.alpha, peft.dropout) == ("lora", 16, 32.0, 0.05)
    assert arguments.dataset.data_path == "/path/to/instruction/data"
    assert (arguments.dataset.dataset_format, arguments.dataset.prompt_template) == ("alpaca", "alpaca")
    assert (arguments.checkpoint.save, arguments.checkpoint.save_interval) == ("/path/to/finetuned/checkpoints", 500)
    assert arguments.sources["optimizer.lr"] == "config.yaml:12"
    assert arguments.sources["checkpoint.load"] == "config.yaml:5"
    assert arguments.sources["optimizer.clip_grad"] == "default"


def test_documented_lora_example(write):
    arguments = load_arguments(write(LORA), [])
    assert arguments.checkpoint.convert_from_hf is True
    assert arguments.checkpoint.hf_model_name_or_path == "meta-llama/Llama-3-8B"
    assert arguments.peft.target_modules == ["q_proj", "v_proj", "k_proj", "o_proj"]
    assert arguments.optimizer.lr == 2e-4
    assert arguments.sources["peft.target_modules"] == "config.yaml:13"


def test_documented_parallelism_example_is_a_range_to_choose_from(write, refuse):
    text = (
        "parallelism:\n  tensor_model_parallel_size: 1-2  # Less than pre-training\n  pipeline_model_parallel_size: 1\n"
    )
    assert refuse(write(text)) == (
        "config.yaml:2: 'parallelism.tensor_model_parallel_size' must be a whole number, got '1-2', a range: "
        "choose one, such as 1"
    )
    arguments = load_arguments(write(text.replace("1-2", "2")), [])
    assert arguments.model.tensor_model_parallel_size == 2


def test_documented_command_lines(write):
    sft = load_arguments(write(SFT), ["--load", "/ckpt", "--data_path", "/data"])
    assert (sft.checkpoint.load, sft.dataset.data_path) == ("/ckpt", "/data")
    lora = load_arguments(write(LORA), ["--use_lora", "--lora_rank", "16", "--lora_alpha", "32"])
    assert (lora.peft.scheme, lora.peft.dim, lora.peft.alpha) == ("lora", 16, 32.0)
    words = (
        "--framework megatron_bridge --convert_from_hf --hf_model_name_or_path meta-llama/Llama-3-8B "
        "--data_path /path/to/instruction/data --lr 5e-6 --train_iters 5000"
    )
    from_hf = load_arguments(None, words.split())
    assert from_hf.checkpoint.convert_from_hf is True
    assert (from_hf.optimizer.lr, from_hf.train.train_iters, from_hf.stage) == (5e-6, 5000, "sft")


def test_every_argument_has_a_source_and_a_type_that_checks(write):
    arguments = load_arguments(write("framework: megatron_bridge\n"), [])
    assert set(arguments.sources) == set(schema.fields()) == {name for name, _, _ in describe(arguments)}
    assert len(schema.fields()) > 60


def test_every_alias_names_an_argument():
    for name, entry in table().items():
        if isinstance(entry, Target) and entry.argument not in ("recipe", "flavor"):
            assert entry.argument in schema.fields(), name


@pytest.mark.parametrize(
    "text, argument, value",
    [
        ("training:\n  precision: bf16\n", "mixed_precision", "bf16_mixed"),
        ("training:\n  bf16: true\n", "mixed_precision", "bf16_mixed"),
        ("precision_config: bf16_mixed\n", "mixed_precision", "bf16_mixed"),
        ("mixed_precision: fp32\n", "mixed_precision", "fp32"),
        ("optimizer:\n  lr: 1e-4\n", "optimizer.lr", 1e-4),
        ("optimizer:\n  lr: 1\n", "optimizer.lr", 1.0),
        ("train:\n  train_iters: 7\n", "train.train_iters", 7),
        ("checkpoint:\n  most_recent_k: -1\n", "checkpoint.save_total_limit", None),
        ("checkpoint:\n  most_recent_k: 2\n", "checkpoint.save_total_limit", 2),
        ("dataset:\n  seq_length: 64\n", "model.seq_length", 64),
        ("training:\n  seq_length: 64\n", "model.seq_length", 64),
        ("training:\n  seed: 3\n", "rng.seed", 3),
        ("peft:\n  dim: 4\n", "peft.scheme", "lora"),
        ("peft: lora\n", "peft.scheme", "lora"),
        ("peft: dora\n", "peft.scheme", "lora"),
        ("peft: dora\n", "peft.use_dora", True),
        ("peft:\n  use_dora: true\n  use_rslora: true\n", "peft.use_rslora", True),
        ("lora:\n  use_lora: true\n  use_dora: true\n", "peft.use_dora", True),
        ("peft: none\n", "peft.scheme", None),
        ("lora:\n", "peft.scheme", None),
        ("logging:\n  log_interval: 5\n", "logger.log_interval", 5),
        ("seed: 5\n", "rng.seed", 5),
        ("data:\n  packed_sequence: false\n", "dataset.pad_to", "longest"),
    ],
)
def test_aliases(write, text, argument, value):
    assert schema.get(load_arguments(write(text), []), argument) == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("lora:\n  lora_rnak: 8\n", "config.yaml:2: unknown key 'lora_rnak' in section 'lora' - did you mean 'lora"),
        ("trainng:\n  lr: 1e-4\n", "config.yaml:1: unknown key 'trainng' at the top level - did you mean 'training'?"),
        ("data:\n  lr: 1e-4\n", "unknown key 'lr' in section 'data' - it belongs in section 'optimizer'"),
        ("training:\n  lr: fast\n", "config.yaml:2: 'training.lr' must be a number, got 'fast'"),
        ("training:\n  lr: '1e-4'\n", "config.yaml:2: 'training.lr' must be a number, got '1e-4': remove the quotes"),
        ("training:\n  lr: .nan\n", "config.yaml:2: 'training.lr' must be a number, got nan"),
        ("training:\n  train_iters: 1.5\n", "'training.train_iters' must be a whole number, got 1.5"),
        ("training:\n  train_iters: true\n", "'training.train_iters' must be a whole number, got true"),
        ("training:\n  train_iters: null\n", "'training.train_iters' must be a whole number, got null: leave"),
        ("lora:\n  use_lora: 1\n", "'lora.use_lora' must be true or false, got 1"),
        ("lora:\n  use_lora: 'yes'\n", "'lora.use_lora' must be true or false, got 'yes'"),
        ("checkpointing:\n  save: 7\n", "'checkpointing.save' must be text, or null, got 7: put it in quotes"),
        ("lora:\n  lora_target_modules: q_proj\n", "'lora.lora_target_modules' must be a list of names, got 'q_proj'"),
        ("lora:\n  lora_target_modules: [1]\n", "must be a list of names"),
        (
            "data:\n  dataset_format: alpacca\n",
            "got 'alpacca' - did you mean 'alpaca'?",
        ),
        ("training: 5\n", "config.yaml:1: 'training' is a section: put its keys below it, got 5"),
        ("training:\n  lr:\n    x: 1\n", "'training.lr' must be a number, got a section"),
        ("framework: megatron\n", "'framework' must be one of megatron_bridge; got 'megatron'"),
        ("stage: dpo\n", "'stage' must be one of pretrain, sft, posttrain; got 'dpo'"),
        ("training:\n  precision: fp16\n", "unknown precision 'fp16'; this version has fp32 and bf16_mixed"),
        ("fp16: true\n", "'fp16' cannot be true: fp16 with loss scaling is not in this version"),
        ("peft: adalora\n", "unknown scheme 'adalora'"),
        ("data:\n  dataset_format: x\n", "config.yaml:2: 'data.dataset_format' must be one of auto, "),
        ("prompt_template: x\n", "config.yaml:1: 'prompt_template' must be one of auto, chat_template,"),
        ("data:\n  columns: x\n", "config.yaml:2: 'data.columns' must be a mapping of names, got 'x'"),
        ("data:\n  sources: {a: b}\n", "'data.sources' must be a list of paths or mappings, got a section"),
        ("data:\n  sources: [3]\n", "config.yaml:2: 'data.sources' must be a list of paths or mappings"),
        ("packed_sequence_specs: {packed_sequence_size: x}\n", "packed_sequence_size must be a whole number, got 'x'"),
        ("packed_sequence_specs: {tokenizer_model_name: x}\n", "only packed_sequence_size is known here"),
    ],
)  # fmt: skip
def test_refusals_say_where_and_what(write, refuse, text, message):
    assert message in refuse(write(text))


def test_one_argument_under_two_names(write, refuse):
    text = "training:\n  lr: 1e-4\noptimizer:\n  lr: 2e-4\n"
    assert refuse(write(text)) == (
        "config.yaml:4: 'optimizer.lr' contradicts 'training.lr' (config.yaml:2): both set optimizer.lr, "
        "to 0.0002 and 0.0001; keep one"
    )
    assert load_arguments(write(text.replace("2e-4", "1e-4")), []).optimizer.lr == 1e-4


def test_lora_keys_without_use_lora_are_not_dropped(write, refuse):
    text = "lora:\n  lora_rank: 8\n"
    assert "config.yaml:2: lora.lora_rank is set but use_lora is not" in refuse(write(text))
    assert "command line --lora_rank: lora_rank is set but use_lora is not" in refuse(None, ["--lora_rank", "16"])
    assert load_arguments(write(text), ["--use_lora"]).peft.scheme == "lora"
    assert load_arguments(write(text), ["--use_lora", "false"]).peft.scheme is None


def test_stage_typed_on_the_command_line(write, refuse):
    flat = write("framework: megatron_bridge\n")
    assert load_arguments(flat, []).stage == "sft"
    assert load_arguments(flat, [], "posttrain").stage == "sft"
    assert load_arguments(flat, [], "pretrain").stage == "pretrain"
    assert load_arguments(flat, [], "pretrain").sources["stage"] == "command line pretrain"
    assert load_arguments(write("stage: pretrain\n"), []).stage == "pretrain"
    assert "config.yaml:1: stage is pretrain, but 'posttrain'" in refuse(write("stage: pretrain\n"), [], "posttrain")


def test_extends_and_recipes(write, refuse):
    write("training:\n  lr: 1e-4\n  train_iters: 10\n", "base/common.yaml")
    write("extends: common.yaml\ntraining:\n  train_iters: 20\n", "base/more.yaml")
    arguments = load_arguments(write("extends: [base/more.yaml]\noptimizer:\n  lr: 3e-4\n"), [])
    assert (arguments.optimizer.lr, arguments.train.train_iters) == (3e-4, 20)
    assert arguments.sources["optimizer.lr"] == "config.yaml:3"
    assert arguments.sources["train.train_iters"] == "base/more.yaml:3"
    assert "config.yaml:1: 'extends': no such file: gone.yaml" in refuse(write("extends: gone.yaml\n"))
    write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    assert "leads back to this file" in refuse("a.yaml")

    arguments = load_arguments(write("recipe: llama3.1_8b_lora\ntraining:\n  lr: 1e-5\n"), ["--train_iters", "3"])
    assert arguments.checkpoint.hf_model_name_or_path == "meta-llama/Llama-3.1-8B"
    assert arguments.sources["peft.dim"].startswith("recipes/lora_trainer.yaml:")
    assert (arguments.optimizer.lr, arguments.train.train_iters) == (1e-5, 3)
    assert load_arguments(None, ["--recipe", "qwen3_8b_sft.yaml"]).stage == "sft"
    assert "did you mean 'llama3.1_8b_lora.yaml'" in refuse(None, ["--recipe", "llama31_8b_lora"])


def test_environment_variables(write, refuse, monkeypatch):
    monkeypatch.setenv("LR", "1e-4")
    monkeypatch.setenv("WHERE", "2024")
    text = (
        "training:\n  lr: ${LR}\n  train_iters: ${STEPS:12}\ncheckpointing:\n  save: ${WHERE}\n  load: ${NONE:null}\n"
    )
    arguments = load_arguments(write(text), [])
    assert (arguments.optimizer.lr, arguments.train.train_iters) == (1e-4, 12)
    assert (arguments.checkpoint.save, arguments.checkpoint.load) == ("2024", None)
    assert load_arguments(write("save: /a/${WHERE}/${X:b}\n"), []).checkpoint.save == "/a/2024/b"
    assert "config.yaml:1: the environment variable NOT_SET_HERE is not set" in refuse(write("save: ${NOT_SET_HERE}\n"))
    assert "without nesting" in refuse(write("save: ${A:${B:c}}\n"))


def test_sources_at_the_top_level_are_the_data_s(write):
    arguments = load_arguments(write("sources: [a.jsonl, {path: b.jsonl, weight: 2}]\n"), [])
    assert [source["path"] for source in arguments.dataset.sources] == ["a.jsonl", "b.jsonl"]


def test_data_options_that_are_mappings_and_lists(write):
    text = """
data:
  sources: [a.jsonl, {path: b.jsonl, weight: 0.5, columns: {instruction: q}}]
  columns: {instruction: question, output: answer}
  custom_format: {user: "{q}", assistant: "{a}"}
  languages: [en, de]
  packing: true
  template_name: chatml
"""
    arguments = load_arguments(write(text), [])
    dataset = arguments.dataset
    assert dataset.sources == [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 0.5, "columns": {"instruction": "q"}}]
    assert dataset.columns == {"instruction": "question", "output": "answer"}
    assert dataset.custom_format == {"user": "{q}", "assistant": "{a}"}
    assert (dataset.languages, dataset.packed_sequence, dataset.prompt_template) == (["en", "de"], True, "chatml")


@pytest.mark.parametrize(
    ("text", "packed", "seq_length"),
    [
        ("packed_sequence: true\n", True, 2048),
        ("dataset:\n  packed_sequence_specs: {packed_sequence_size: 512}\n", True, 512),
        ("dataset:\n  packed_sequence_specs: null\n", False, 2048),
        ("dataset:\n  packed_sequence_specs: {packed_sequence_size: -1}\n", False, 2048),
    ],
)
def test_packing_in_each_spelling(write, text, packed, seq_length):
    arguments = load_arguments(write(text), [])
    assert (arguments.dataset.packed_sequence, arguments.model.seq_length) == (packed, seq_length)
