"""Every post-training example of Primus v26.5.0: it means the same here, or is refused with the reason."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from primus_bridge.config import load_arguments, primus, schema
from primus_bridge.config.merge import Noted, find, is_section
from primus_bridge.config.validate import validate
from primus_bridge.errors import ConfigError

FACTS = yaml.safe_load(Path(__file__).with_name("primus_posttrain.yaml").read_text(encoding="utf-8"))
CASES = [(group, name) for group, facts in FACTS.items() for name in facts["files"]]
CHECKOUT = os.environ.get("PRIMUS_CHECKOUT")

STATE_SPACE = "its layers are state-space ones"
BALANCED = "'moe_router_force_load_balancing' cannot be true: it routes tokens"
INLINE_BOS = "'sft_bridge_compat_inline_bos' cannot be true: it puts a BOS"
REFUSED = {
    "MI300X mamba_370M_sft_posttrain": STATE_SPACE,
    "MI300X zebra_llama_1B_sft_posttrain": STATE_SPACE,
    "MI300X zebra_llama_3B_sft_posttrain": STATE_SPACE,
    "MI300X zebra_llama_8B_sft_posttrain": STATE_SPACE,
    "llama3_8b_lora_posttrain_packed": "'peft' stands beside 'modules', where Primus drops it: write peft_",
    "qwen3_30b_a3b_lora_posttrain_packed": "stands beside 'modules', where Primus drops it",
    "llama2_70b_lora_mlperf_posttrain": "it trains in MXFP4",
    "deepseek_v2_lite-BF16-sft-packed-bridge_aligned": INLINE_BOS,
    "llama2_70B-BF16-sft-packed-bridge_aligned": INLINE_BOS,
    "llama2_70B-BF16-sft-packed-mlperf_aligned": "'fp8_param_gather' cannot be true: fp8 and fp4",
    "llama2_70B-FP8-sft-packed-perf": "'fp8' cannot be 'hybrid': fp8",
    "qwen3_235B_A22B-BF16-sft": "'sequence_parallel' must be true or false, got 1",
    "qwen3_235B_A22B_4layer-BF16-sft": "no model: give hf_model_name_or_path",
    "qwen3_30B_A3B-BF16-sft-packed-bridge_aligned": BALANCED,
    "qwen3_30B_A3B-BF16-sft-packed": BALANCED,
}
"""Name of an example -> a part of the message."""
BALANCING_LOSS = "there is no balancing loss in this version"
"""That of the native examples of a model whose preset, which only a Primus has, asks for it."""

SAME = (
    *("model.tensor_model_parallel_size", "model.pipeline_model_parallel_size", "model.context_parallel_size"),
    *("model.virtual_pipeline_model_parallel_size", "model.expert_model_parallel_size", "model.seq_length"),
    *("model.recompute_granularity", "model.recompute_method", "model.recompute_num_layers"),
    *("train.train_iters", "train.global_batch_size", "train.micro_batch_size", "train.eval_interval"),
    *("optimizer.lr", "optimizer.min_lr", "optimizer.weight_decay", "optimizer.adam_beta1", "optimizer.adam_beta2"),
    *("optimizer.adam_eps", "scheduler.lr_warmup_iters", "scheduler.lr_decay_iters", "scheduler.lr_decay_style"),
    *("ddp.use_distributed_optimizer", "ddp.overlap_grad_reduce", "checkpoint.save_interval", "checkpoint.finetune"),
    *("checkpoint.pretrained_checkpoint", "tokenizer.tokenizer_model", "rng.seed", "dataset.packed_sequence"),
    *("dataset.num_workers", "logger.wandb_project", "model.enable_primus_turbo", "model.use_turbo_attention"),
)
"""Arguments whose name in Primus is the last word."""
RENAMED = {
    "finetune_lr": "optimizer.lr",
    "peft_dim": "peft.dim",
    "peft_alpha": "peft.alpha",
    "sft_dataset_name": "dataset.data_path",
    "sft_conversation_format": "dataset.prompt_template",
    "enable_packed_sequences": "dataset.packed_sequence",
    "hf_path": "checkpoint.hf_model_name_or_path",
    "precision_config": "mixed_precision",
}
MEANS = {**{argument.rpartition(".")[2]: argument for argument in SAME}, **RENAMED}


def overrides_of(group: str, name: str) -> dict[str, Any]:
    facts = FACTS[group]["files"][name]
    shared = {key: value for key, value in FACTS[group]["shared"].items() if key not in facts.get("absent", ())}
    return {**facts["overrides"], **{key: value for key, value in shared.items() if key not in facts["overrides"]}}


@pytest.fixture
def example(write):
    """The file of a case. Native examples are read without their model preset, which only a Primus has."""

    def make(group: str, name: str) -> str:
        facts = FACTS[group]["files"][name]
        module = {"framework": "megatron_bridge", "config": "sft_trainer.yaml", "overrides": overrides_of(group, name)}
        if group == "bridge":
            module["model"] = facts["model"]
        tree = {"exp_name": name, "modules": {"post_trainer": module}, **facts.get("beside", {})}
        return write(yaml.safe_dump(tree, sort_keys=False, width=10_000))

    return make


@pytest.mark.parametrize("group, name", CASES, ids=[name for _, name in CASES])
def test_an_example_means_the_same_or_says_why_not(example, group, name):
    path = example(group, name)
    if name in REFUSED:
        with pytest.raises(ConfigError) as caught:
            validate(load_arguments(path, []))
        assert REFUSED[name] in str(caught.value)
        return
    arguments = load_arguments(path, [])
    overrides = overrides_of(group, name)
    told = " ".join(arguments.notes)
    for key, value in overrides.items():
        if key in MEANS:
            assert schema.get(arguments, MEANS[key]) == value, key
            assert arguments.sources[MEANS[key]].startswith("config.yaml:")
            continue
        entry = find(primus.table(), key)
        assert entry is not None or is_section(primus.table(), key), key
        if isinstance(entry, Noted):
            assert (f"'{key}'" in told) == (value not in entry.neutral), key
    assert (arguments.peft.scheme == "lora") == (overrides.get("peft") == "lora" or "lora" in overrides)
    if "lora" in overrides:
        lora = arguments.peft
        asked = overrides["lora"]
        assert (lora.dim, lora.alpha, lora.dropout) == (asked["dim"], asked["alpha"], asked["dropout"])
        assert (lora.target_modules, lora.lora_A_init_method) == (asked["target_modules"], "xavier")
    if overrides.get("eval_iters") == 0:
        assert arguments.dataset.validation_split == 0.0
    assert arguments.stage == "sft"
    assert arguments.checkpoint.save == f"output/{name}"
    assert arguments.checkpoint.convert_from_hf == (not overrides.get("pretrained_checkpoint"))
    validate(arguments)


def test_what_the_model_preset_adds(example):
    arguments = load_arguments(example("bridge", "qwen3_8b_lora_posttrain"), [])
    flavor = "flavor qwen3_8b_finetune_config"
    for argument, value in {
        "checkpoint.hf_model_name_or_path": "Qwen/Qwen3-8B",
        "dataset.data_path": "rajpurkar/squad",
        "dataset.prompt_template": "squad",
        "dataset.validation_split": 0.1,
        "optimizer.weight_decay": 0.033,
        "optimizer.adam_beta2": 0.98,
        "optimizer.adam_eps": 1e-5,
        "train.eval_iters": 32,
        "rng.seed": 5678,
        "peft.dim": 32,
        "peft.alpha": 32.0,
        "peft.target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    }.items():
        assert schema.get(arguments, argument) == value
        source = "recipes/qwen3_8b.yaml:4" if argument.startswith("checkpoint") else flavor
        assert arguments.sources[argument] == source


def test_mended_as_the_message_says(example, write):
    path = Path(example("bridge", "llama3_8b_lora_posttrain_packed"))
    text = path.read_text()
    beside = text.index("\npeft:\n")
    mended = text[:beside].replace("peft: lora", "peft: lora\n      peft_dim: 16\n      peft_alpha: 64", 1) + "\n"
    arguments = load_arguments(write(mended, "mended.yaml"), [])
    assert (arguments.peft.scheme, arguments.peft.dim, arguments.peft.alpha) == ("lora", 16, 64.0)
    with pytest.raises(ConfigError, match=r"lr_warmup_iters 50 must be below train_iters 20 \(mended.yaml:\d+\): set"):
        validate(arguments)  # Megatron asserts the same


@pytest.mark.skipif(CHECKOUT is None, reason="PRIMUS_CHECKOUT names no checkout of Primus")
def test_a_real_primus(tmp_path, monkeypatch):
    """Every post-training file of the checkout, with the checkout's own presets where the name is not ours."""
    assert CHECKOUT is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(CHECKOUT)
    monkeypatch.delitem(sys.modules, "primus", raising=False)  # another test's
    examples = Path(CHECKOUT) / "examples"
    found = sorted(examples.glob("megatron_bridge/configs/**/*posttrain*.yaml"))
    found += sorted(examples.glob("mlperf/**/*posttrain*.yaml"))
    found += sorted(examples.glob("megatron/configs/**/*sft*.yaml"))
    outcomes: dict[str, str] = {}
    copies = [tmp_path / file.parent.name / file.name for file in found]
    for file, copy in zip(found, copies, strict=True):
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text().replace("framework: megatron\n", "framework: megatron_bridge\n"))
    for file, copy in zip(found, copies, strict=True):
        name = f"MI300X {file.stem}" if "MI300X" in file.parts else file.stem
        try:
            validate(load_arguments(str(copy), []))
            outcomes[name] = "runs"
        except ConfigError as error:
            outcomes[name] = str(error)
    # a flat file that extends an experiment: Primus reads none of its keys
    assert "'lora' stands beside 'modules'" in outcomes.pop("llama3_8B-BF16-lora-sft")
    refused = REFUSED | {name: BALANCING_LOSS for name in outcomes if name.startswith("deepseek_v2_lite")}
    for name, outcome in outcomes.items():
        assert refused[name] in outcome if name in refused else outcome == "runs", (name, outcome)
    assert list(outcomes.values()).count("runs") >= 12


@pytest.mark.skipif(CHECKOUT is None, reason="PRIMUS_CHECKOUT names no checkout of Primus")
def test_the_native_preset_of_a_real_primus(write, monkeypatch):
    """Its whole chain of some 450 keys, and the shapes of the native model presets."""
    assert CHECKOUT is not None
    monkeypatch.syspath_prepend(CHECKOUT)
    monkeypatch.delitem(sys.modules, "primus", raising=False)  # another test's
    # what the model preset asks for and this version refuses can be taken back
    unbalanced = ", moe_aux_loss_coeff: 0, moe_router_load_balancing_type: none"
    for model in ("llama3_8B", "qwen3_30B_A3B", "deepseek_v2_lite", "llama2_70B"):
        more = unbalanced if model.startswith("deepseek") else ""
        arguments = load_arguments(
            write(
                "exp_name: x\nmodules:\n  m:\n    framework: megatron_bridge\n"
                f"    config: ../megatron/sft_trainer.yaml\n    model: {model}.yaml\n"
                f"    overrides: {{hf_path: m{more}}}\n"
            ),
            [],
        )
        validate(arguments)
        assert (arguments.stage, arguments.optimizer.weight_decay, arguments.train.eval_iters) == ("sft", 0.1, 10)
        assert arguments.dataset.data_path == "tatsu-lab/alpaca"
        assert len(arguments.notes) < 30
        assert arguments.shape["num_layers"][0] in (27, 32, 48, 80)
