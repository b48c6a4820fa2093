"""SFTConfig: every name of it means an argument, or is refused with the reason; the file and the keywords agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import yaml

from primus_bridge import CheckpointCallback, SFTConfig, SFTTrainer, ValidationCallback
from primus_bridge.config import load_arguments, schema
from primus_bridge.config.follow import steps_of_epochs
from primus_bridge.config.validate import check_world, validate
from primus_bridge.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LEAST = dict(base_model="gpt2", dataset_name="rows.json")


def made(**fields):
    return SFTConfig(**LEAST | fields).arguments


@pytest.mark.parametrize(
    "fields, argument, expected",
    [
        (dict(base_model="m"), "checkpoint.hf_model_name_or_path", "m"),
        (dict(base_model="m"), "checkpoint.convert_from_hf", True),
        (dict(dataset_name="owner/name"), "dataset.data_path", "owner/name"),
        (dict(dataset_name=Path("a") / "b.json"), "dataset.data_path", "a/b.json"),
        (dict(dataset_format="chat"), "dataset.dataset_format", "chat"),
        (dict(template_name="chatml"), "dataset.prompt_template", "chatml"),
        (dict(template_name=None), "dataset.prompt_template", "auto"),
        (dict(use_lora=True), "peft.scheme", "lora"),
        (dict(use_lora=False, lora_r=8), "peft.scheme", None),
        (dict(use_lora=True, use_qlora=False), "peft.scheme", "lora"),
        (dict(use_lora=True, lora_r=8), "peft.dim", 8),
        (dict(use_lora=True, lora_alpha=16), "peft.alpha", 16.0),
        (dict(use_lora=True, lora_dropout=0.1), "peft.dropout", 0.1),
        (dict(use_lora=True, lora_target_modules=("c_attn",)), "peft.target_modules", ["c_attn"]),
        (dict(use_lora=True, lora_target_modules=None), "peft.target_modules", ["all-linear"]),
        (dict(batch_size=4), "train.micro_batch_size", 4),
        (dict(gradient_accumulation_steps=4), "train.gradient_accumulation_steps", 4),
        (dict(learning_rate=2e-4), "optimizer.lr", 2e-4),
        (dict(num_epochs=3), "train.num_epochs", 3.0),
        (dict(num_train_epochs=0.5), "train.num_epochs", 0.5),
        (dict(max_steps=7), "train.train_iters", 7),
        (dict(max_steps=7), "train.num_epochs", None),
        (dict(max_steps=-1), "train.num_epochs", 3.0),
        (dict(num_epochs=None, max_steps=None), "train.num_epochs", 3.0),
        (dict(gradient_accumulation_steps=None), "train.gradient_accumulation_steps", 1),
        (dict(warmup_steps=5), "scheduler.lr_warmup_iters", 5),
        (dict(warmup_ratio=0.03), "scheduler.lr_warmup_fraction", 0.03),
        (dict(weight_decay=0.1), "optimizer.weight_decay", 0.1),
        (dict(max_seq_length=512), "model.seq_length", 512),
        (dict(max_grad_norm=0.5), "optimizer.clip_grad", 0.5),
        (dict(mixed_precision="bf16"), "mixed_precision", "bf16_mixed"),
        (dict(mixed_precision="no"), "mixed_precision", "fp32"),
        (dict(mixed_precision=False), "mixed_precision", "fp32"),  # what YAML makes of no
        (dict(optimizer_type="adamw"), "optimizer.lr", 5e-6),
        (dict(scheduler_type="linear"), "scheduler.lr_decay_style", "linear"),
        (dict(lr_scheduler_type="constant_with_warmup"), "scheduler.lr_decay_style", "constant"),
        (dict(device_map="auto"), "dist.device", None),
        (dict(output_dir="out"), "checkpoint.save", "out"),
        (dict(logging_steps=10), "logger.log_interval", 10),
        (dict(eval_steps=50, validation_split=0.1), "train.eval_interval", 50),
        (dict(save_steps=60), "checkpoint.save_interval", 60),
        (dict(save_total_limit=2), "checkpoint.save_total_limit", 2),
        (dict(), "checkpoint.save_total_limit", 3),
        (dict(), "checkpoint.convert_to_hf", True),
        (dict(use_lora=True, save_merged_model=True), "checkpoint.save_merged_model", True),
        (dict(run_name="first"), "logger.wandb_exp_name", "first"),
        (dict(wandb_project="mine"), "logger.wandb_project", "mine"),
        (dict(seed=7), "rng.seed", 7),
        (dict(gradient_checkpointing=True), "model.recompute_granularity", "full"),
        (dict(gradient_checkpointing=False), "model.recompute_granularity", None),
        (dict(packing=True), "dataset.packed_sequence", True),
        (dict(validation_split=0.1), "dataset.validation_split", 0.1),
        (dict(nproc=2), "dist.nproc", 2),
        # and the names of the flat dialect
        (dict(tensor_model_parallel_size=2), "model.tensor_model_parallel_size", 2),
        (dict(global_batch_size=32), "train.gradient_accumulation_steps", None),
        (dict(data={"languages": ["en"]}), "dataset.languages", ["en"]),
        (dict(), "stage", "sft"),
    ],
)
def test_what_a_name_means(fields, argument, expected):
    assert schema.get(made(**fields), argument) == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(use_qlora=True), "SFTConfig(use_qlora=...): 'use_qlora' cannot be true: Megatron-Core holds the base"),
        (dict(load_in_4bit=True), "'load_in_4bit' cannot be true: Megatron-Core holds"),
        (dict(mixed_precision="fp16"), "'mixed_precision': fp16 needs loss scaling"),
        (dict(optimizer_type="paged_adamw_8bit"), "cannot be 'paged_adamw_8bit': this version has AdamW with fp32"),
        (dict(device_map="cpu"), "'device_map' cannot be 'cpu': ranks and their devices follow the layout"),
        (dict(trust_remote_code=True), "'trust_remote_code' cannot be true: no code of a model folder is run"),
        (dict(scheduler_type="polynomial"), "unknown schedule 'polynomial'"),
        (dict(lerning_rate=1e-4), "unknown key 'lerning_rate' at the top level - did you mean 'learning_rate'?"),
        (dict(learning_rate="fast"), "SFTConfig(learning_rate=...): 'learning_rate' must be a number, got 'fast'"),
        (dict(lora_r=8), "lora_r is set but use_lora is not"),
        (dict(num_epochs=2, max_steps=10), "num_epochs and train_iters (SFTConfig(max_steps=...)) are both set"),
        (
            dict(gradient_accumulation_steps=2, global_batch_size=8),
            "gradient_accumulation_steps and global_batch_size (SFTConfig(global_batch_size=...)) are both set",
        ),
        (dict(learning_rate=-1.0), "lr -1.0 must be above 0"),
        (dict(streaming=True, num_epochs=2), "num_epochs 2.0 needs the number of sequences, which streaming never has"),
        (dict(eval_steps=0, validation_split=0.1), "eval_interval 0 must be above 0"),
        (dict(dataset_name=None), "no data: give"),
    ],
)  # fmt: skip
def test_what_is_refused(fields, message):
    with pytest.raises(ValueError) as refused:
        made(**fields)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SFTConfig("c.yaml"), "SFTConfig: it takes keywords"),
        (lambda: SFTConfig({"base_model": "m"}), "a dict is SFTConfig(**fields), and a file SFTConfig.from_yaml(path)"),
        (lambda: SFTConfig.from_yaml({"base_model": "m"}), "SFTConfig.from_yaml: it takes the path of a YAML file"),
        (lambda: SFTTrainer("c.yaml"), "SFTTrainer: config is an SFTConfig"),
        (lambda: SFTTrainer(SFTConfig(**LEAST), ValidationCallback(eval_steps=1)), "callbacks is a list of callbacks"),
        (lambda: SFTTrainer(SFTConfig(**LEAST), "ValidationCallback"), "got 'ValidationCallback'"),
        (
            lambda: SFTTrainer(SFTConfig(**LEAST), [CheckpointCallback]).train(),
            "CheckpointCallback is a class: give an",
        ),
    ],
)
def test_what_is_no_config_and_no_callback(make, message):
    with pytest.raises(ConfigError) as refused:
        make()
    assert message in str(refused.value)


def test_numbers_of_another_library_are_numbers():
    arguments = made(
        learning_rate=numpy.float64(1e-3),
        max_steps=numpy.int64(3),
        callbacks=({"path": "ValidationCallback", "eval_steps": numpy.int32(2)},),
    )
    assert (arguments.optimizer.lr, arguments.train.train_iters) == (1e-3, 3)
    assert yaml.safe_load(yaml.safe_dump(arguments.to_dict()))["logger"]["callbacks"][0]["eval_steps"] == 2
    with pytest.raises(ConfigError, match="'max_steps' must be a whole number, got 3.5"):
        made(max_steps=numpy.float64(3.5))


def test_nothing_can_be_set_by_mistake():
    with pytest.raises(AttributeError):
        SFTConfig(**LEAST).learning_rate = 1e-4


def test_file_keywords_and_command_line_agree(tmp_path):
    fields = dict(LEAST, use_lora=True, lora_r=8, batch_size=2, max_steps=5, mixed_precision=False, output_dir="out")
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(fields))
    by_keywords = SFTConfig(**fields).arguments
    by_file = SFTConfig.from_yaml(file).arguments
    by_command = load_arguments(str(file), [])
    validate(by_command)
    assert by_keywords.to_dict() == by_file.to_dict() == by_command.to_dict()
    assert by_file.sources["peft.dim"] == f"{file}:4"
    assert by_keywords.sources["checkpoint.save_total_limit"] == "default of SFTConfig"
    other = SFTConfig.from_yaml(file, lora_r=16, num_epochs=2).arguments
    assert (other.peft.dim, other.train.num_epochs) == (16, 2.0)  # and the file's max_steps are taken back
    validate(other)
    assert load_arguments(str(file), ["--lora_r", "4", "--batch_size", "3"]).train.micro_batch_size == 3


def test_other_dialects_are_read_too(tmp_path):
    file = tmp_path / "flat.yaml"
    file.write_text(
        "hf_model_name_or_path: m\nconvert_from_hf: true\ndata: {data_path: d.json}\ntraining: {lr: 1e-4}\n"
    )
    arguments = SFTConfig.from_yaml(file, learning_rate=2e-4).arguments
    assert (arguments.optimizer.lr, arguments.train.train_iters, arguments.checkpoint.convert_to_hf) == (
        2e-4,
        100,
        False,
    )


@pytest.mark.parametrize("name", ["sft_alpaca.yaml", "sft_chat_qlora.yaml"])
def test_examples(name):
    arguments = SFTConfig.from_yaml(EXAMPLES / name).arguments
    assert arguments.peft.scheme == "lora" and arguments.train.num_epochs == 1
    assert not arguments.notes


def test_the_batch_follows_the_ranks():
    arguments = made(batch_size=2, gradient_accumulation_steps=3, tensor_model_parallel_size=2)
    check_world(arguments, 8)
    assert arguments.train.global_batch_size == 24
    assert arguments.sources["train.global_batch_size"] == (
        "follows micro_batch_size 2 x gradient_accumulation_steps 3 x 4 data-parallel ranks"
    )
    check_world(arguments, 2)
    assert arguments.train.global_batch_size == 6


@pytest.mark.parametrize(
    "epochs, sequences, batch, steps",
    [(3, 1234, 16, 232), (1, 16, 4, 4), (1, 17, 4, 5), (0.5, 17, 4, 3), (1.1, 10, 1, 11), (2, 3, 8, 1)],
)
def test_steps_of_epochs(epochs, sequences, batch, steps):
    assert steps_of_epochs(epochs, sequences, batch) == steps


def test_a_later_layer_takes_back_the_alternative(tmp_path):
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("training: {train_iters: 50, num_epochs: null}\n")
    top.write_text("extends: base.yaml\nnum_train_epochs: 2\n")
    arguments = load_arguments(str(top), [])
    assert arguments.train.num_epochs == 2 and arguments.sources["train.train_iters"] == "default"
    arguments = load_arguments(str(top), ["--train_iters", "7"])
    assert (arguments.train.train_iters, arguments.train.num_epochs) == (7, None)


def test_importing_the_api_imports_no_torch():
    code = (
        "import sys, primus_bridge\n"
        "assert not any(name.startswith('primus_bridge.') for name in sys.modules)\n"
        "from primus_bridge import SFTConfig, SFTTrainer, Callback, ConfigError\n"
        "from primus_bridge import ValidationCallback, WandBCallback, CheckpointCallback\n"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules\n"
        "assert 'SFTTrainer' in dir(primus_bridge)\n"
        "try:\n    primus_bridge.SFTTrainr\nexcept AttributeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "module 'primus_bridge' has no attribute 'SFTTrainr'\n"), done.stderr


def test_a_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)
