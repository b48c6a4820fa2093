"""The Primus experiment dialect: its keys, its stage, and the traps that become errors."""

from __future__ import annotations

import re

import pytest

from primus_bridge.config import load_arguments, schema
from primus_bridge.config.run_yaml import from_plain

# as Primus's own examples are written
LORA = """\
work_group: ${PRIMUS_TEAM:amd}
user_name: ${PRIMUS_USER:root}
exp_name: ${PRIMUS_EXP_NAME:qwen3_8b_lora_posttrain}
workspace: ${PRIMUS_WORKSPACE:./output}

modules:
  post_trainer:
    framework: megatron_bridge
    config: sft_trainer.yaml

    # Model to run
    model: qwen3_8b.yaml

    overrides:
      # Parallelism configuration
      tensor_model_parallel_size: 1
      pipeline_model_parallel_size: 1
      context_parallel_size: 1
      sequence_parallel: false

      # Training configuration
      train_iters: 1000
      global_batch_size: 128
      micro_batch_size: 1
      seq_length: 2048
      eval_interval: 30
      save_interval: 50

      # PEFT configuration
      peft: lora
      packed_sequence: false

      # Optimizer configuration
      finetune_lr: 1.0e-4
      min_lr: 0.0
      lr_warmup_iters: 50

      # Precision
      precision_config: bf16_mixed
"""

MODULE = """\
exp_name: run
modules:
  anything:
    framework: megatron_bridge
    overrides:
"""


@pytest.fixture(autouse=True)
def no_primus_variables(monkeypatch):
    for name in ("PRIMUS_TEAM", "PRIMUS_USER", "PRIMUS_EXP_NAME", "PRIMUS_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def module(write):
    """A file of one module with these overrides (lines)."""

    def make(*lines: str) -> str:
        return write(MODULE + "".join(f"      {line}\n" for line in lines))

    return make


def test_an_example_of_primus_word_for_word(write):
    arguments = load_arguments(write(LORA), [])
    assert (arguments.stage, arguments.sources["stage"]) == ("sft", "recipes/sft_trainer.yaml:2")
    assert (arguments.optimizer.lr, arguments.sources["optimizer.lr"]) == (1e-4, "config.yaml:34")
    assert arguments.optimizer.weight_decay == 0.033
    assert arguments.sources["optimizer.weight_decay"] == "flavor qwen3_8b_finetune_config"
    assert arguments.model.seq_length == 2048
    assert arguments.peft.scheme == "lora"
    assert arguments.mixed_precision == "bf16_mixed"
    assert arguments.checkpoint.save == "./output/amd/root/qwen3_8b_lora_posttrain"
    assert arguments.sources["checkpoint.save"].startswith("config.yaml:3 ")
    assert arguments.checkpoint.hf_model_name_or_path == "Qwen/Qwen3-8B"
    assert arguments.checkpoint.convert_from_hf is True


def test_save_folder_follows_the_environment_and_yields_to_save(write, monkeypatch):
    monkeypatch.setenv("PRIMUS_EXP_NAME", "007")
    assert load_arguments(write(LORA), []).checkpoint.save == "./output/amd/root/007"
    assert load_arguments(write(LORA), ["--save", "here"]).checkpoint.save == "here"


def test_weights_named_otherwise_are_not_converted(write):
    assert load_arguments(write(LORA), ["--pretrained_checkpoint", "c"]).checkpoint.convert_from_hf is False
    assert load_arguments(write(LORA), ["--convert_from_hf", "false"]).checkpoint.convert_from_hf is False
    assert load_arguments(write(LORA), ["--stage", "pretrain"]).checkpoint.convert_from_hf is False


def test_stage_is_never_guessed_from_the_name_of_a_module(write):
    text = MODULE.replace("anything", "sft_trainer") + "      lr: 1e-4\n"
    assert load_arguments(write(text), []).stage == "pretrain"
    assert load_arguments(write(text), [], "posttrain").stage == "sft"
    assert load_arguments(write(text + "      stage: sft\n"), []).stage == "sft"


@pytest.mark.parametrize(
    "lines, argument, value",
    [
        (["peft: lora", "peft_dim: 4", "peft_alpha: 8"], "peft.dim", 4),
        (["peft: {dim: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj]}"], "peft.scheme", "lora"),
        (["peft: {dim: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj]}"], "peft.target_modules", ["q_proj"]),
        (["peft: dora"], "peft.use_dora", True),
        (["peft: {dim: 4, use_rslora: true}"], "peft.use_rslora", True),
        (["peft: none"], "peft.scheme", None),
        (["peft: ${NOT_SET_PEFT:null}"], "peft.scheme", None),
        (["lora: {enabled: true, dim: 4, alpha: 8}"], "peft.dim", 4),
        (["lora: {enabled: false, dim: 4}"], "peft.scheme", None),
        (["lora:", "  enabled: true", "  lora_A_init_method: kaiming"], "peft.scheme", "lora"),
        (["sft_dataset_name: tatsu-lab/alpaca"], "dataset.data_path", "tatsu-lab/alpaca"),
        (["dataset_name: tatsu-lab/alpaca"], "dataset.data_path", "tatsu-lab/alpaca"),
        (["dataset: {dataset_name: tatsu-lab/alpaca}"], "dataset.data_path", "tatsu-lab/alpaca"),
        (["sft_conversation_format: chatml"], "dataset.prompt_template", "chatml"),
        (["hf_path: Qwen/Qwen3-8B"], "checkpoint.hf_model_name_or_path", "Qwen/Qwen3-8B"),
        (["tokenizer_model: Qwen/Qwen3-8B"], "tokenizer.tokenizer_model", "Qwen/Qwen3-8B"),
        (["use_distributed_optimizer: false"], "ddp.use_distributed_optimizer", False),
        (["recompute_granularity: full"], "model.recompute_granularity", "full"),
        (["lr_decay_iters: null"], "scheduler.lr_decay_iters", None),
        (["finetune: true", "pretrained_checkpoint: /c"], "checkpoint.finetune", True),
        (["enable_primus_turbo: false", "use_turbo_attention: false"], "stage", "pretrain"),
        (["optimizer: adam", "fp16: false", "fp8: null", "wandb_project: null"], "stage", "pretrain"),
        (["comm_overlap_config: null", "use_megatron_fsdp: false"], "stage", "pretrain"),
    ],
)
def test_keys_of_primus(module, lines, argument, value):
    assert schema.get(load_arguments(module(*lines), []), argument) == value


def test_keys_without_effect_are_told(module):
    lines = (
        "stderr_sink_level: DEBUG",
        "swiglu: false",
        "pipeline_dtype: bf16",
        "qk_layernorm: true",
        "manual_gc: false",
    )
    arguments = load_arguments(module(*lines), [])
    assert [re.split(" ha(s|ve) no", note)[0] for note in arguments.notes] == [
        "config.yaml:6: 'stderr_sink_level'",
        "config.yaml:7: 'swiglu' and 'qk_layernorm'",
        "config.yaml:8: 'pipeline_dtype'",
    ]


@pytest.mark.parametrize(
    "line",
    [
        *("enable_primus_turbo: true", "use_turbo_gemm: true", "use_turbo_deepep: true"),
        *("comm_overlap_config: {tp_comm_overlap: true}", "cross_entropy_fusion_impl: te", "apply_rope_fusion: true"),
        *("gradient_accumulation_fusion: false", "manual_gc_interval: 100", "nvtx_ranges: true"),
        *("calculate_per_token_loss: false", "ckpt_format: torch", "HSA_NO_SCRATCH_RECLAIM: 1"),
        *("dist_ckpt_strictness: log_all", "log_avg_skip_iterations: 0", "no_save_rng: true", "data_sharding: false"),
        *("attention_softmax_in_fp32: false", "moe_router_dtype: fp64", "apply_query_key_layer_scaling: true"),
        *("turbo_deepep_num_cu: 64", "moe_router_bias_update_rate: 1e-2", "do_test: true"),
    ],
)
def test_switches_of_speed_and_habit_do_not_stop_a_run(module, line):
    told = load_arguments(module(line), []).notes
    assert len(told) == (0 if line.startswith("enable_primus_turbo") else 1)  # that one only allows others
    assert all(f"config.yaml:6: '{line.split(':')[0]}' has no effect here" in note for note in told)


def test_a_null_says_nothing(module):
    lines = ("data_path: null", "sft_dataset_name: mine", "no_save_optim: null", "train_iters: null", "spec: null")
    arguments = load_arguments(module(*lines), [])
    assert (arguments.dataset.data_path, arguments.checkpoint.save_optim) == ("mine", True)
    assert arguments.sources["train.train_iters"] == "default"


@pytest.mark.parametrize(
    "line",
    [
        *("moe_aux_loss_coeff: 0", "moe_aux_loss_coeff: 0.0", "moe_z_loss_coeff: null", "moe_router_dtype: fp32"),
        *("moe_router_load_balancing_type: none", "moe_router_load_balancing_type: aux_loss", "dataloader_type: batch"),
        *("label_smoothing: 0.0", "use_turbo_float8_linear: false", "moe_router_enable_expert_bias: false"),
        *("dataset: {do_validation: true}", "scheduler: {start_weight_decay: null}", "do_test: null"),
        *("ddp: {check_for_nan_in_grad: true}", "eval_interval: 0", "save_interval: 0", "wandb_project: 'null'"),
    ],
)
def test_values_that_ask_for_nothing(module, line):
    arguments = load_arguments(module(line), [])
    assert (arguments.notes, arguments.shape) == ([], {})
    intervals = (arguments.train.eval_interval, arguments.checkpoint.save_interval)
    assert (*intervals, arguments.logger.wandb_project) == (None, None, None)


def test_no_evaluation(module):
    config = module("validation_split: 0.1", "eval_interval: 5", "eval_iters: 0")
    arguments = load_arguments(config, [])
    assert (arguments.dataset.validation_split, arguments.train.eval_iters) == (0.0, None)
    assert arguments.sources["dataset.validation_split"] == "config.yaml:8 (eval_iters: 0)"
    arguments = load_arguments(config, ["--eval_iters", "8"])
    assert (arguments.dataset.validation_split, arguments.train.eval_iters) == (0.1, 8)


def test_what_cannot_be_honoured_can_be_taken_back(module, write, refuse):
    write("moe_aux_loss_coeff: 1e-3\nmoe_router_load_balancing_type: seq_aux_loss\n", "theirs.yaml")
    taken = MODULE.replace("    overrides", "    model: theirs.yaml\n    overrides") + "      moe_aux_loss_coeff: 0\n"
    assert "theirs.yaml:2: 'moe_router_load_balancing_type' cannot be 'seq_aux_loss'" in refuse(write(taken))
    load_arguments(write(taken), ["--moe_router_load_balancing_type", "none"])


def test_what_is_said_of_the_shape_is_kept(module):
    lines = ("num_layers: 2", "rotary_base: 1000000", "model: {norm_epsilon: 1e-3}", "kv_channels: null")
    arguments = load_arguments(module(*lines), ["--num_layers", "3", "--hidden_size", "null"])
    assert arguments.notes == []
    assert arguments.shape == {
        "num_layers": [3, "command line --num_layers"],
        "rotary_base": [1e6, "config.yaml:7"],
        "norm_epsilon": [1e-3, "config.yaml:8"],
    }
    again = from_plain(arguments.to_dict(), arguments.sources, arguments.notes)
    assert (again.shape, again) == (arguments.shape, arguments)


def test_weight_decay_as_primus_writes_it(module, refuse):
    """Megatron-Bridge's schedule writes it into every step, from a start to an end."""
    ends = "scheduler: {start_weight_decay: 0.1, end_weight_decay: 0.1}"
    assert load_arguments(module(ends), []).optimizer.weight_decay == 0.1
    assert load_arguments(module("end_weight_decay: 0", "start_weight_decay: 0.0"), []).optimizer.weight_decay == 0
    words = ["--scheduler.start_weight_decay", "0.2", "--scheduler.end_weight_decay", "0.2"]
    assert load_arguments(module(ends), words).optimizer.weight_decay == 0.2
    unequal = refuse(module(ends.replace("0.1}", "0.2}")))
    assert "'scheduler.start_weight_decay' cannot be 0.1: weight decay is the same at every step" in unequal
    assert "cannot be 0.2: weight decay is the same" in refuse(module(ends), words[:2])
    both = refuse(module(ends, "optimizer: {weight_decay: 0.2}"))
    assert "'optimizer.weight_decay' contradicts 'scheduler.end_weight_decay' (config.yaml:6)" in both


def test_weight_decay_beside_a_flavor(module):
    flavor = ("stage: sft", "recipe: qwen.qwen3", "flavor: qwen3_8b_finetune_config")
    arguments = load_arguments(module(*flavor, "optimizer: {weight_decay: 0.1}"), [])
    told = "config.yaml:9: weight decay is 0.1 here; Primus itself stays at 0.033, which flavor 'qwen3_8b_finetune_c"
    assert arguments.optimizer.weight_decay == 0.1 and any(note.startswith(told) for note in arguments.notes)
    for silent in ("weight_decay: 0.033", "scheduler: {start_weight_decay: 0.1, end_weight_decay: 0.1}"):
        assert not any("weight decay" in note for note in load_arguments(module(*flavor, silent), []).notes)


def test_the_scheme_that_is_named_last_is_the_one(module):
    def dora(config: str, *words: str) -> bool:
        return load_arguments(config, list(words)).peft.use_dora

    file = module("peft: dora")
    assert not dora(file, "--peft", "lora")
    assert dora(file, "--use_lora") and dora(file, "--peft", "lora", "--use_dora") and dora(file)
    assert dora(module("peft: lora", "use_dora: true")) and dora(module("use_dora: true", "peft: lora"))
    assert dora(file, "--use_dora", "--peft", "lora") and dora(file, "--peft", "lora", "--peft", "dora")


def test_keys_of_lora_without_lora_are_told(module):
    told = load_arguments(module("peft_dim: 4", "peft: none"), []).notes
    assert told == ["config.yaml:6: 'peft_dim' has no effect here: full fine-tuning has no adapters"]
    assert load_arguments(module("peft: lora", "peft_dim: 4"), ["--peft", "none"]).notes == []
    told = load_arguments(module("peft: none"), ["--peft_dim", "4", "--peft_alpha", "8"]).notes
    assert len(told) == 1 and told[0].startswith("command line --peft_dim: 'peft_dim' and 'peft_alpha' have no effect")


def test_keys_in_the_sections_of_megatron_bridge(module):
    arguments = load_arguments(module("dataset: {val_proportion: 0.2}", "stage: posttrain"), [])
    assert (arguments.dataset.validation_split, arguments.stage) == (0.2, "sft")
    assert arguments.sources["stage"] == "config.yaml:7"


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "packed_train_data_path: x.npy",
            "'packed_train_data_path' cannot be 'x.npy': samples are packed",
        ),
        ("use_megatron_fsdp: true", "'use_megatron_fsdp' cannot be true: fully sharded"),
        ("enable_turbo_attention_float8: true", "'enable_turbo_attention_float8' cannot be true: fp8"),
        *(
            (f"{name}: true", f"'{name}' cannot be true: fp8 is not in this version")
            for name in (
                "enable_turbo_gemm_float8",
                "use_turbo_float8_linear",
                "use_turbo_mx_linear",
                "use_turbo_fp8_x",
            )
        ),
        ("use_turbo_atention: true", "unknown key 'use_turbo_atention' at the top level - did you mean 'use_turbo_att"),
        ("moe_aux_loss_coeff: 1e-3", "cannot be 0.001: the router is kept as it was trained: there is no balancing"),
        ("moe_z_loss_coeff: 0.1", "'moe_z_loss_coeff' cannot be 0.1: the router is kept as it was trained"),
        ("moe_router_load_balancing_type: sinkhorn", "cannot be 'sinkhorn': the router is kept as it was trained"),
        ("moe_router_enable_expert_bias: true", "cannot be true: a router's bias is kept as it was trained"),
        ("encoder_seq_length: 64", "'encoder_seq_length' cannot be 64: write seq_length"),
        ("use_sink_attention: true", "'use_sink_attention' cannot be true: there is no attention sink"),
        ("perform_rl_step: true", "'perform_rl_step' cannot be true: this version fine-tunes and pretrains"),
        ("vision_pretraining: true", "'vision_pretraining' cannot be true: this version fine-tunes and pretrains"),
        ("dataloader_type: single", "'dataloader_type' cannot be 'single': write shuffle: false"),
        ("iterations_to_skip: [3]", "'iterations_to_skip' cannot be [3]: every step is trained"),
        ("fp32_residual_connection: true", "'fp32_residual_connection' cannot be true: the residual is of"),
        ("deterministic_mode: true", "'deterministic_mode' cannot be true: this version has no deterministic mode"),
        ("data_parallel_random_init: true", "cannot be true: every data-parallel rank starts from the same weights"),
        ("label_smoothing: 0.1", "'label_smoothing' cannot be 0.1: the loss is the cross entropy"),
        ("scheduler: {start_weight_decay: 0.1}", "'scheduler.start_weight_decay' cannot be 0.1: weight decay is the"),
        ("checkpoint: {non_persistent_ckpt_type: global}", "cannot be 'global'"),
        ("dataset: {do_validation: false}", "'dataset.do_validation' cannot be false: write eval_iters: 0"),
        ("num_layers: two", "'num_layers' must be a whole number, or null, got 'two'"),
        ("moe_router_force_load_balancing: true", "'moe_router_force_load_balancing' cannot be true: it routes"),
        ("exp_avg_dtype: bf16", "'exp_avg_dtype' cannot be 'bf16': moments"),
        ("dataset: {mock: true}", "'dataset.mock' cannot be true: made-up data trains nothing"),
        ("mock_data: true", "'mock_data' cannot be true: made-up data trains nothing"),
        ("sequence_parallel: 1", "'sequence_parallel' must be true or false, got 1: write true"),
        ("precision_config: bf16_with_mxfp8_mixed", "unknown precision 'bf16_with_mxfp8_mixed'"),
        ("optimizer: sgd", "'optimizer' cannot be 'sgd': this version has Adam"),
        ("split: 95,5,0", "'split' cannot be '95,5,0'"),
        ("fp8: hybrid", "'fp8' cannot be 'hybrid'"),
        ("sft_conversation_format: mystery", "'sft_conversation_format' must be one of"),
        ("lora: {enabled: true, dropout_position: post}", "'lora.dropout_position' cannot be 'post'"),
        ("lora: {dim: 4}", "lora.dim is set but use_lora is not"),
        ("tensor_parallel_size: 2", "unknown key 'tensor_parallel_size' at the top level"),
        ("train_iters: ten", "config.yaml:6: 'train_iters' must be a whole number, got 'ten'"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_its_reason(module, refuse, line, message):
    assert message in refuse(module(line))


@pytest.mark.parametrize("line", ["peft: lora", "model: {lr: 1}", "lora: {enabled: true}", "lr: 1e-4", "stage: sft"])
def test_settings_beside_modules_are_not_dropped(write, refuse, line):
    key = line.split(":")[0]
    assert refuse(write(f"{line}\n{MODULE}      train_iters: 3\n")) == (
        f"config.yaml:1: '{key}' stands beside 'modules', where Primus drops it: put it under modules.NAME.overrides"
    )


def test_misplaced_and_misspelt_structure(write, refuse):
    assert "config.yaml:1: unknown key 'exp_nam' at the top level - did you mean 'exp_name'?" in refuse(
        write("exp_nam: x\n" + MODULE)
    )
    in_module = "modules:\n  m:\n    framework: megatron_bridge\n    lr: 1e-4\n"
    assert "config.yaml:4: unknown key 'lr' in module 'm': put it under modules.m.overrides" in refuse(write(in_module))
    typo = "modules:\n  m:\n    framework: megatron_bridge\n    override:\n      lr: 1e-4\n"
    assert "unknown key 'override' in module 'm' - did you mean 'overrides'?" in refuse(write(typo))
    assert "'modules' must hold" in refuse(write("modules: [a]\n"))
    assert "'modules.m' must hold" in refuse(write("modules:\n  m: 3\n"))
    not_mapping = "modules:\n  m:\n    framework: megatron_bridge\n    overrides: 3\n"
    assert "config.yaml:4: 'modules.m.overrides' must hold" in refuse(write(not_mapping))


def test_unset_variable_is_named(write, refuse):
    assert "config.yaml:1: the environment variable NOT_SET_TEAM is not set" in refuse(
        write("work_group: ${NOT_SET_TEAM}\n" + MODULE)
    )


@pytest.mark.parametrize(
    ("lines", "on"),
    [
        (["profile: true", "use_pytorch_profiler: true"], True),
        (["profile: true"], True),
        (["use_pytorch_profiler: false", "profile: true"], False),  # Megatron-LM waits for nsys then
        (["profile: true", "use_pytorch_profiler: false"], False),
    ],
)
def test_the_two_switches_of_megatron_s_profiler(module, lines, on):
    assert load_arguments(module(*lines), []).profiling.use_pytorch_profiler is on
