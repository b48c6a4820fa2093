"""BridgeArguments as the real ConfigContainer of each release, validated by itself: SFT and LoRA, several layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from primus_bridge.config.container_keys import WHOLE, unset_values
from tests.bridge.conftest import in_bridge, json_of, portable_model
from tests.bridge.container_keys import has
from tests.cli.example import alpaca_rows, write_rows
from tests.family_models import save

BASE = (
    "--engine bridge --framework megatron_bridge --convert_from_hf --hf_model_name_or_path model --data_path rows.json "
    "--save out --train_iters 20 --global_batch_size 8 --seq_length 64 --lr 1e-3"
)
CASES = {
    "sft": "",
    "bf16, tp2 sp pp2": "--bf16 --tensor_model_parallel_size 2 --sequence_parallel --pipeline_model_parallel_size 2",
    "cp2, recompute": "--context_parallel_size 2 --recompute_granularity full --micro_batch_size 2",
    "vpp, packed": "--pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2 --packed_sequence",
    "uneven": "--pipeline_model_parallel_size 2 --num_layers_in_first_pipeline_stage 1",
    "schedule": "--lr_decay_style linear --lr_warmup_fraction 0.1 --lr_decay_iters 10 --weight_decay 0.3 --min_lr 1e-4 "
    "--validation_split 0.25 --eval_interval 5 --eval_iters 2 --save_interval 5 --save_total_limit 3 --seed 7",
    "wandb": "--wandb_project p --logger.tensorboard false --log_interval 3 --dist.distributed_timeout_minutes 5",
    "lora": "--use_lora --lora_rank 4 --lora_alpha 8 --lora_dropout 0.1",
    "fused lora": "--use_lora --lora_target_modules linear_qkv,linear_fc2",
    "dora": "--use_lora --use_dora --lora_target_modules linear_qkv,linear_proj,linear_fc1,linear_fc2",
    "q only": "--use_lora --lora_target_modules q_proj,v_proj",
    "dora of projections": "--use_lora --use_dora",
    "vocabulary": "--tensor_model_parallel_size 8",
    "streaming": "--streaming",
    "weights in part": "--prompt_loss_weight 0.5",
    "pretrain": "--stage pretrain",
    "cpu": "--dist.device cpu",
    "export of adapters": "--use_lora --convert_to_hf",
    "packs of two": "--packed_sequence --micro_batch_size 2",
    "other engine's": "--load core",
    "epochs": "--num_epochs 2",
    "a family it has not": "--hf_model_name_or_path mixtral",
    "positions it would lose": "--hf_model_name_or_path dynamic",
}
REFUSED = {
    "q only": "command line --lora_target_modules: 'target_modules' cannot be q_proj,v_proj with engine bridge: it has "
    "adapters on all projections of linear_qkv or on none, and k is left out",
    "dora of projections": "'target_modules' cannot be all-linear with engine bridge: its DoRA is one of Megatron's",
    "vocabulary": "command line --tensor_model_parallel_size: 'tensor_model_parallel_size' cannot be 8 with engine "
    "bridge: it does not pad the vocabulary of 204",
    "streaming": "command line --streaming: 'streaming' cannot be true with engine bridge: ",
    "weights in part": "command line --prompt_loss_weight: 'prompt_loss_weight' cannot be 0.5 with engine bridge: ",
    "pretrain": "command line --stage: 'stage' cannot be 'pretrain' with engine bridge: ",
    "cpu": "command line --dist.device: 'device' cannot be 'cpu' with engine bridge: ",
    "export of adapters": "command line --convert_to_hf: 'convert_to_hf' cannot be true with engine bridge: ",
    "packs of two": "command line --micro_batch_size: 'micro_batch_size' cannot be 2 with engine bridge: ",
    "other engine's": "core: holds checkpoints of engine core",
    "a family it has not": "mixtral: AutoBridge of the installed megatron-bridge cannot make this model "
    "(['MixtralForCausalLM'])",
    "positions it would lose": "dynamic/config.json: engine bridge ",
}


@pytest.fixture(scope="module", params=["0.3", "0.6"])
def built(request, tmp_path_factory) -> tuple[str, dict, dict]:
    """The release, every case's container, and the release's own defaults."""
    folder: Path = tmp_path_factory.mktemp("containers")
    portable_model(folder / "model", vocab_size=204)
    (folder / "model" / "model.safetensors").unlink()  # of the model its config.json is enough
    save("mixtral", folder / "mixtral")
    save("llama, dynamic rope", folder / "dynamic")
    write_rows(folder / "rows.json", alpaca_rows(24))
    (folder / "core" / "iter_0000001").mkdir(parents=True)
    (folder / "core" / "iter_0000001" / "manifest.json").write_text("{}")
    words = {}
    for name, more in CASES.items():
        base = BASE.replace("--train_iters 20 ", "") if name == "epochs" else BASE
        words[name] = [*base.split(), *more.split()]
    (folder / "cases.json").write_text(json.dumps(words))
    done = in_bridge(request.param, folder, "-m", "tests.bridge.containers", "cases.json", "out.json", "defaults.json")
    results = json_of(done, folder / "out.json")
    for name, result in results.items():
        assert "invalid" not in result, (name, result)
    return request.param, results, json.loads((folder / "defaults.json").read_text())


def parts(built, name: str) -> dict:
    assert "yaml" in built[1][name], built[1][name]
    return built[1][name]["yaml"]


def test_what_it_cannot_take_is_an_error_that_names_the_key(built):
    for name, message in REFUSED.items():
        assert built[1][name].get("error", "").startswith(message) or message in built[1][name].get("error", ""), (
            name,
            built[1][name],
        )


def test_container_keys_are_those_of_the_release(built):
    for section, fields in built[2].items():
        for field, values in fields.items():
            known = unset_values(field if section == WHOLE else f"{section}.{field}")
            assert known is not None and all(has(known, value) for value in values), (section, field, values, known)


def test_sft(built):
    it = parts(built, "sft")
    assert next(iter(it)) == "_target_"  # and no line of a log before it
    assert it["_target_"].endswith("ConfigContainer") and it["peft"] is None
    assert it["train"]["micro_batch_size"] == 1 and it["train"]["global_batch_size"] == 8
    assert it["train"]["train_iters"] == 20 and it["scheduler"]["lr_decay_iters"] is None
    assert it["optimizer"]["lr"] == 1e-3 and it["optimizer"]["use_distributed_optimizer"] is True
    assert it["model"]["seq_length"] == it["dataset"]["seq_length"] == 64
    assert it["model"]["calculate_per_token_loss"] is True and it["ddp"]["average_in_collective"] is False
    assert it["checkpoint"]["save"] == it["checkpoint"]["load"] == "out"
    assert it["checkpoint"]["pretrained_checkpoint"] == "out/pretrained"
    assert it["dataset"]["_target_"].endswith("PrimusSamples") and it["dataset"]["samples"]["data_path"] == "rows.json"
    assert it["mixed_precision"]["params_dtype"]["_target_"] == "torch.float32"
    assert it["logger"]["tensorboard_dir"] == "out/tensorboard" and it["dist"]["distributed_backend"] == "nccl"
    section = it["train" if built[0] == "0.3" else "validation"]
    assert section["eval_iters"] == 0


def test_layouts(built):
    it = parts(built, "bf16, tp2 sp pp2")
    model = it["model"]
    assert (model["tensor_model_parallel_size"], model["pipeline_model_parallel_size"]) == (2, 2)
    assert model["sequence_parallel"] is True and it["mixed_precision"]["bf16"] is True
    model = parts(built, "cp2, recompute")["model"]
    assert model["context_parallel_size"] == 2
    assert [model[f"recompute_{name}"] for name in ("granularity", "method", "num_layers")] == ["full", "uniform", 1]
    assert parts(built, "vpp, packed")["model"]["virtual_pipeline_model_parallel_size"] == 2
    model = parts(built, "uneven")["model"]
    assert (model["num_layers_in_first_pipeline_stage"], model["num_layers_in_last_pipeline_stage"]) == (1, None)


def test_schedule_evaluation_and_checkpoints(built):
    it = parts(built, "schedule")
    scheduler, section = it["scheduler"], it["train" if built[0] == "0.3" else "validation"]
    assert (scheduler["lr_decay_style"], scheduler["lr_warmup_fraction"], scheduler["lr_decay_iters"]) == (
        "linear",
        0.1,
        10,
    )
    assert scheduler["start_weight_decay"] == scheduler["end_weight_decay"] == it["optimizer"]["weight_decay"] == 0.3
    assert it["optimizer"]["min_lr"] == 1e-4 and it["rng"]["seed"] == 7
    assert (section["eval_interval"], section["eval_iters"]) == (5, 2)
    assert it["checkpoint"]["save_interval"] == 5 and it["checkpoint"]["most_recent_k"] == 3
    assert built[1]["schedule"]["lr_decay_steps"] == 10 * 8
    it = parts(built, "epochs")
    assert it["train"]["train_iters"] is None  # until the sequences are counted


def test_logger(built):
    it = parts(built, "wandb")
    logger = it["logger"]
    assert (logger["wandb_project"], logger["wandb_exp_name"], logger["wandb_save_dir"]) == ("p", "out", "out/wandb")
    assert logger["tensorboard_dir"] is None and logger["log_interval"] == 3
    assert it["dist"]["distributed_timeout_minutes"] == 5


def test_adapters(built):
    peft = parts(built, "lora")["peft"]
    assert peft["_target_"].endswith("CanonicalLoRA")
    assert peft["target_modules"] == sorted(
        ["linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2"]
    )
    assert (peft["dim"], peft["alpha"], peft["dropout"]) == (4, 8, 0.1)
    peft = parts(built, "fused lora")["peft"]
    assert peft["_target_"].endswith(".LoRA") and peft["target_modules"] == ["linear_fc2", "linear_qkv"]
    assert parts(built, "dora")["peft"]["_target_"].endswith(".DoRA")
