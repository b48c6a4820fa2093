"""Overrides: the four forms, types by the argument, the last one wins, everything unknown refused."""

from __future__ import annotations

import re

import pytest

from primus_bridge.config import BridgeArguments, flat, load_arguments, schema, sft
from primus_bridge.config.merge import Target
from primus_bridge.config.validate import validate


@pytest.mark.parametrize(
    "words, argument, value",
    [
        ("--lr 1e-4", "optimizer.lr", 1e-4),
        ("--lr=1e-4", "optimizer.lr", 1e-4),
        ("lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("--optimizer.lr 1e-4", "optimizer.lr", 1e-4),
        ("--optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("--training.lr 1e-4", "optimizer.lr", 1e-4),
        ("--lr 1 --lr 2", "optimizer.lr", 2.0),
        ("--lr 1 --finetune_lr 2", "optimizer.lr", 2.0),
        ("--save_interval 5", "checkpoint.save_interval", 5),
        ("--weight_decay 0", "optimizer.weight_decay", 0.0),
        ("--save-interval 5", "checkpoint.save_interval", 5),
        ("--save_interval none", "checkpoint.save_interval", None),
        ("--validation_level none", "checkpoint.validation_level", "none"),
        ("--validation_level null", "checkpoint.validation_level", None),
        ("--convert_from_hf", "checkpoint.convert_from_hf", True),
        ("--convert_from_hf --lr 1", "checkpoint.convert_from_hf", True),
        ("--convert_from_hf false", "checkpoint.convert_from_hf", False),
        ("--convert_from_hf 1", "checkpoint.convert_from_hf", True),
        ("convert_from_hf=no", "checkpoint.convert_from_hf", False),
        ("--use_lora", "peft.scheme", "lora"),
        ("--use_lora --use_dora", "peft.use_dora", True),
        ("--use_lora --use_rslora", "peft.use_rslora", True),
        ("--peft dora", "peft.use_dora", True),
        ("--use_lora --lora_target_modules q_proj,v_proj", "peft.target_modules", ["q_proj", "v_proj"]),
        ("--use_lora --lora_target_modules q_proj v_proj --lr 1", "peft.target_modules", ["q_proj", "v_proj"]),
        ("--use_lora --lora_target_modules [q_proj, v_proj]", "peft.target_modules", ["q_proj", "v_proj"]),
        ("--save 123", "checkpoint.save", "123"),
        ("--save a=b", "checkpoint.save", "a=b"),
        ("--save=a=b", "checkpoint.save", "a=b"),
        ("--data_path /d --seed 7", "rng.seed", 7),
        ("--seq_length 64", "model.seq_length", 64),
        ("--nproc 4", "dist.nproc", 4),
        ("--recompute_granularity full", "model.recompute_granularity", "full"),
        ("--profile", "profiling.use_pytorch_profiler", True),
        ("--profile --seed 7", "profiling.use_pytorch_profiler", True),
        ("--profile_ranks 0 3", "profiling.profile_ranks", [0, 3]),
        ("--profile_ranks [0,3]", "profiling.profile_ranks", [0, 3]),
        ("--profile_ranks 2", "profiling.profile_ranks", [2]),
        ("--profile_ranks null", "profiling.profile_ranks", None),
        ("--bf16", "mixed_precision", "bf16_mixed"),
        ("--stage pretrain", "stage", "pretrain"),
    ],
)
def test_forms(words, argument, value):
    result = schema.get(load_arguments(None, words.split(" ")), argument)
    assert (result, type(result)) == (value, type(value))


def test_short_names_of_the_contract():
    flags = "convert_from_hf convert_to_hf use_lora".split()
    values = (
        "load=a save=b data_path=c lr=1 min_lr=0 train_iters=1 micro_batch_size=1 global_batch_size=1 seq_length=1 "
        "tensor_model_parallel_size=1 pipeline_model_parallel_size=1 lora_rank=1 lora_alpha=1 lora_dropout=0 "
        "hf_model_name_or_path=d hf_save_path=e stage=sft seed=1"
    ).split()
    words = [f"--{flag}" for flag in flags]
    for pair in values:
        name, value = pair.split("=")
        words += [f"--{name}", value]
    arguments = load_arguments(None, words)
    given = [name for name, source in arguments.sources.items() if source.startswith("command line --")]
    assert len(given) == len(flags) + len(values)


def test_a_negative_number_is_a_value():
    assert load_arguments(None, ["--min_lr", "-1"]).optimizer.min_lr == -1.0


def test_command_line_wins_over_file_and_says_so(write):
    path = write("training:\n  lr: 1e-4\n  min_lr: 1e-5\n")
    arguments = load_arguments(path, ["--lr", "2e-4", "optimizer.clip_grad=0.5"])
    assert arguments.optimizer.lr == 2e-4
    assert arguments.sources["optimizer.lr"] == "command line --lr"
    assert arguments.sources["optimizer.min_lr"] == "config.yaml:3"
    assert arguments.sources["optimizer.clip_grad"] == "command line optimizer.clip_grad="


ALTERNATIVES = """\
load: c
recompute_granularity: full
recompute_method: uniform
recompute_num_layers: 2
lr_warmup_iters: 10
validation_split: 0.1
pipeline_model_parallel_size: 4
num_layers_in_first_pipeline_stage: 3
data_path: d
"""


@pytest.mark.parametrize(
    "words, gone",
    [
        (["--recompute_granularity", "null"], {"model.recompute_method": "uniform", "model.recompute_num_layers": 2}),
        (["--recompute_granularity", "selective"], {"model.recompute_method": "uniform"}),
        (["--lr_warmup_fraction", "0.1"], {"scheduler.lr_warmup_iters": 10}),
        (["--validation_data_path", "v"], {"dataset.validation_split": 0.1}),
        (["--pipeline_model_parallel_size", "1"], {"model.num_layers_in_first_pipeline_stage": 3}),
    ],
)
def test_what_cannot_stand_beside_a_word_is_taken_back(write, words, gone):
    arguments = load_arguments(write(ALTERNATIVES), words)
    for argument, before in gone.items():
        assert schema.get(arguments, argument) == schema.get(BridgeArguments(), argument)
        told = f"{words[0]}: '{words[0][2:]}' takes the place of {argument.partition('.')[2]} {before} (config.yaml:"
        assert any(told in note for note in arguments.notes)
    validate(arguments)


def test_what_can_stand_beside_a_word_is_not_taken_back(write):
    path = write(ALTERNATIVES)
    for words in (
        ["--recompute_granularity", "full", "--pipeline_model_parallel_size", "4"],  # as they are
        ["--lr_warmup_fraction", "null"],
        ["--recompute_granularity", "full", "--recompute_num_layers", "1"],
    ):
        arguments = load_arguments(path, words)
        assert arguments.model.recompute_method == "uniform" and arguments.scheduler.lr_warmup_iters == 10
        assert arguments.model.num_layers_in_first_pipeline_stage == 3 and arguments.train.num_epochs is None
    arguments = load_arguments(write("lr_warmup_fraction: 0.1\nlr_decay_iters: 50\n"), ["--lr_warmup_iters", "0"])
    assert (arguments.scheduler.lr_warmup_fraction, arguments.scheduler.lr_decay_iters) == (None, 50)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--lora_rnak", "8"], "command line --lora_rnak: unknown key 'lora_rnak' at the top level - did you mean"),
        (["optimizer.lrr=1"], "unknown key 'lrr' in section 'optimizer' - did you mean 'lr'?"),
        (["--lr"], "command line --lr: 'lr' needs a value: --lr VALUE"),
        (["--lr", "--seed", "1"], "command line --lr: 'lr' needs a value"),
        (["--lr", "fast"], "command line --lr: 'lr' must be a number, got 'fast'"),
        (["--lr="], "command line --lr: 'lr' must be a number"),
        (["--train_iters", "1e3"], "'train_iters' must be a whole number, got 1000.0"),
        (["--convert_from_hf", "maybe"], "unexpected argument 'maybe'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--use_lora=perhaps"], "'use_lora' must be true or false, got 'perhaps'"),
        (["--prompt_template", "chatlm"], "got 'chatlm' - did you mean 'chatml'?"),
        (["--base_model", "m"], "unknown key 'base_model' at the top level - that is SFTConfig's; here write "
                                "--hf_model_name_or_path with --convert_from_hf"),
        (["--learning_rate", "1"], "that is SFTConfig's; here write --lr"),
        (["--lora-r", "8"], "here write --lora_rank"),
        (["--gradient_checkpointing"], "here write --recompute_granularity full"),
        (["--load_in_4bit"], "'load_in_4bit' at the top level - Megatron-Core holds the base model in bf16"),
        (["--bnb_4bit_quant_type", "nf4"], "- it belongs to use_qlora"),
        (["--validation_level", "fast"], "'validation_level' must be one of none, quick, tensor, full, or null; got"),
        (["--columns", "instruction"], "'columns' must be a mapping of names, got 'instruction'"),
    ],
)  # fmt: skip
def test_refusals(refuse, words, message):
    assert message in refuse(None, words)


def test_the_words_for_another_spelling_are_words_of_this_one():
    for name in (key for key, entry in sft.KEYS.items() if isinstance(entry, Target)):
        written, *others = re.findall(r"--(\w+)", sft.in_other_words(name))
        assert flat.table()[written].argument == sft.KEYS[name].argument
        assert all(flat.table()[other].argument in sft.KEYS[name].also(None) for other in others)
