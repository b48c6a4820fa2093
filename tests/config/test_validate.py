"""Arguments that cannot make a run are refused at their source; derived values are filled in with theirs."""

from __future__ import annotations

import pytest

from primus_bridge.config import load_arguments
from primus_bridge.config.validate import check_world, layout_size, validate
from primus_bridge.errors import ConfigError

BASE = ["--convert_from_hf", "--hf_model_name_or_path", "hf", "--data_path", "d", "--save", "s"]


def load(words: str = "", base=BASE):
    return load_arguments(None, [*base, *words.split()])


def refusal(words: str, base=BASE) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(load(words, base))
    return str(caught.value)


def test_a_plain_run_is_fine():
    validate(load())


@pytest.mark.parametrize(
    "words, message",
    [
        ("--micro_batch_size 0", "command line --micro_batch_size: micro_batch_size 0 must be above 0"),
        ("--train_iters -5", "train_iters -5 must be above 0"),
        ("--max_nonfinite 0", "max_nonfinite 0 must be above 0"),
        ("--on_nonfinite rollback --save_optim false", "on_nonfinite 'rollback' goes back to checkpoints with a"),
        ("--lr 0", "lr 0.0 must be above 0"),
        ("--weight_decay -1", "weight_decay -1.0 must not be below 0"),
        ("--validation_split 1", "validation_split 1.0 must be at least 0 and below 1"),
        ("--lora_dropout 1.5 --use_lora", "dropout 1.5 must be at least 0 and below 1"),
        ("--micro_batch_size 3 --global_batch_size 8", "global_batch_size 8 must be a multiple of micro_batch_size 3"),
        ("--seed 18446744073709551616", "seed 18446744073709551616 must not be above"),
        ("--distributed_backend nccl --device cpu", "distributed_backend 'nccl' needs GPUs"),
        (
            "--sequence_parallel --tensor_model_parallel_size 2 --seq_length 65",
            "seq_length 65 must divide by tensor_model_parallel_size 2",
        ),
        ("--virtual_pipeline_model_parallel_size 2", "virtual_pipeline_model_parallel_size 2 needs pipeline"),
        ("--num_layers_in_first_pipeline_stage 2", "num_layers_in_first_pipeline_stage 2 needs pipeline"),
        (
            "--context_parallel_size 2 --sequence_parallel --tensor_model_parallel_size 2 --seq_length 68",
            "seq_length 68 must divide by 2 x context_parallel_size 2 x tensor_model_parallel_size 2",
        ),
        ("--context_parallel_size 0", "context_parallel_size 0 must be above 0"),
        ("--expert_model_parallel_size 0", "expert_model_parallel_size 0 must be above 0"),
        ("--min_lr 1e-3 --lr 1e-4", "min_lr 0.001 must not be above lr 0.0001"),
        ("--lr_warmup_iters 100 --train_iters 100", "lr_warmup_iters 100 must be below train_iters 100"),
        ("--lr_warmup_iters 50 --lr_decay_iters 40", "lr_warmup_iters 50 must be below lr_decay_iters 40"),
        ("--lr_warmup_iters 5 --lr_warmup_fraction 0.1", "lr_warmup_fraction 0.1 and lr_warmup_iters are both set"),
        ("--recompute_method block", "recompute_method 'block' is for recompute_granularity: full only"),
        ("--validation_split 0.1 --validation_data_path v", "validation_split 0.1 and validation_data_path"),
        ("--dataset_format text", "dataset_format 'text' is for stage pretrain"),
        ("--stage pretrain --dataset_format alpaca", "dataset_format 'alpaca' is for stage sft"),
        ("--pretrained_checkpoint c", "pretrained_checkpoint 'c' and convert_from_hf are both set"),
        ("--finetune --stage pretrain --convert_from_hf false", "finetune true takes its weights from load or"),
        ("--profile_step_end 10", "profile_step_end 10 must be above profile_step_start 10"),
        ("--profile_ranks one", "'profile_ranks' must be a list of whole numbers"),
        ("--optimizer_offload_fraction 1.5", "optimizer_offload_fraction 1.5 must be between 0 and 1"),
        ("--optimizer_cpu_offload", "optimizer_cpu_offload true needs mixed_precision: bf16_mixed"),
        (
            "--optimizer_cpu_offload --bf16 --use_distributed_optimizer false",
            "optimizer_cpu_offload true needs use_distributed_optimizer: true",
        ),
        ("--profiling.use_nsys_profiler true", "nsys is started around the command"),
        ("--profiling.record_memory_history true", "SAVE/memory.json"),
        ("--save_merged_model", "save_merged_model true is for LoRA runs"),
    ],
)
def test_refusals(words, message):
    assert message in refusal(words)


def test_what_a_run_needs():
    assert "no data: give data.data_path" in refusal("", BASE[:3] + BASE[5:])
    assert "convert_from_hf true needs hf_model_name_or_path" in refusal("", [BASE[0], *BASE[3:]])
    assert "no model: give hf_model_name_or_path" in refusal("", BASE[3:])
    assert "nothing to fine-tune" in refusal("", BASE[1:])
    validate(load("--stage pretrain", BASE[1:]))
    validate(load("--load ckpt", BASE[3:]))


def test_a_run_without_a_save_folder_gets_one_of_its_own():
    first, again, other = (load(words, BASE[:5]) for words in ("", "--nproc 2", "--lr 1e-3"))
    assert first.checkpoint.save == again.checkpoint.save != other.checkpoint.save
    assert first.checkpoint.save.startswith("runs/sft-")
    assert f"no save is given: the run is in {first.checkpoint.save}" in first.notes


def test_one_virtual_stage_is_none():
    for layout in ("", " --pipeline_model_parallel_size 2 --global_batch_size 3"):
        arguments = load("--virtual_pipeline_model_parallel_size 1" + layout)
        validate(arguments)
        assert arguments.model.virtual_pipeline_model_parallel_size is None
        check_world(arguments, layout_size(arguments))


def test_what_changes_nothing_is_noted():
    arguments = load("--sequence_parallel --hf_save_path out --overlap_param_gather true")
    validate(arguments)
    validate(arguments)
    assert arguments.model.sequence_parallel is False
    said = sorted(note.split("'")[1] for note in arguments.notes)
    assert said == ["hf_save_path", "overlap_param_gather", "sequence_parallel"]


def test_full_recompute_gets_its_method_and_says_why():
    arguments = load("--recompute_granularity full")
    validate(arguments)
    assert (arguments.model.recompute_method, arguments.model.recompute_num_layers) == ("uniform", 1)
    assert arguments.sources["model.recompute_method"] == (
        "follows recompute_granularity (command line --recompute_granularity)"
    )


def test_evaluation_without_a_validation_set_is_told():
    arguments = load("--eval_interval 5")
    validate(arguments)
    assert "'eval_interval' has no effect here" in arguments.notes[0]
    arguments = load("--eval_interval 5 --validation_split 0.1")
    validate(arguments)
    assert arguments.notes == []


def test_world():
    layout = "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2"
    arguments = load(f"{layout} --global_batch_size 8 --micro_batch_size 2")
    assert layout_size(arguments) == 4
    for world in (4, 8, 16):
        check_world(arguments, world)
    with pytest.raises(ConfigError, match=r"6 ranks do not divide .* of 4 .*--nproc 8"):
        check_world(arguments, 6)
    with pytest.raises(ConfigError, match=r"global_batch_size 8 must be a multiple of .* = 2 x 3 = 6"):
        check_world(arguments, 12)
    with pytest.raises(ConfigError, match="profile_ranks .* names rank 4 of a run of 4 ranks"):
        check_world(load(f"{layout} --profile_ranks 0 4"), 4)
    virtual = load(f"{layout} --virtual_pipeline_model_parallel_size 2 --global_batch_size 3 --micro_batch_size 1")
    with pytest.raises(ConfigError, match="gives 3 micro-batches a rank"):
        check_world(virtual, 4)
