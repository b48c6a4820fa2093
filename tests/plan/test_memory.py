"""The planned peak of a rank against what real ranks take, within 10 %; and what a plan says of it."""

from __future__ import annotations

import json

import pytest

from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.peft.plan import adapter_plan
from primus_bridge.plan import attention, output
from primus_bridge.plan.device import Device
from primus_bridge.plan.layout import Layout
from primus_bridge.plan.memory import stage_memory
from primus_bridge.plan.plan import memory_warning
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.plan.ranks import constants, peaks

SHAPE = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
LLAMA = dict(SHAPE, model_type="llama")
TIED = dict(LLAMA, tie_word_embeddings=True)
MIXTRAL = dict(SHAPE, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=352)
BF16 = {"mixed_precision": "bf16_mixed"}
LORA = {"peft": {"scheme": "lora", "dim": 8}}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VIRTUAL = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
PACKED = {"dataset": {"packed_sequence": True}}
DOCUMENT = 128

CASES = {
    "full fine-tuning": (1, LLAMA, {}, {}, (2, 2)),
    "bf16, tied": (1, TIED, {}, BF16, (2, 2)),
    "LoRA, bf16, packed": (1, LLAMA, {}, {**BF16, **LORA, **PACKED}, (4, 4)),
    "recompute": (1, LLAMA, FULL, {}, (4, 4)),
    "tensor and sequence parallel": (2, LLAMA, SEQUENCE, {}, (4, 4)),
    "interleaved pipeline": (2, LLAMA, VIRTUAL, {}, (2, 8)),
    "data parallel, experts": (2, MIXTRAL, {"expert_model_parallel_size": 2}, {}, (2, 4)),
}
"""name -> (ranks, config.json, layout, other sections, (micro, global) batch)"""


def given(model: dict, sections: dict, batch: tuple[int, int]):
    train = {"micro_batch_size": batch[0], "global_batch_size": batch[1]}
    return arguments_for({"seq_length": 256, **model}, train=train, **sections)


def write_config(folder, config: dict) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_peak_of_real_ranks(case, tmp_path):
    ranks, config, model_arguments, sections, batch = CASES[case]
    arguments = given(model_arguments, sections, batch)
    folder = write_config(tmp_path / "model", config)
    model = HFModel.open(folder, weights=False)
    adapters = adapter_plan(arguments.peft, model) if arguments.peft.scheme else None
    layout = Layout.of(arguments, model.architecture, ranks)
    stages = stage_memory(arguments, model.family, model.architecture, layout, adapters, cpu=True)
    real = run_distributed(peaks, ranks, folder, [(arguments, DOCUMENT)])
    for rank, [peak] in enumerate(real):
        stage = stages[rank * layout.pipeline // ranks]
        assert stage.total == pytest.approx(peak, rel=0.1), (rank, stage)


def test_warning_of_a_device_that_is_too_small(tmp_path):
    model = HFModel.open(write_config(tmp_path / "model", LLAMA), weights=False)
    arguments = given({}, {}, (2, 2))
    assert memory_warning(arguments, model, None, 1, Device.gpu(2 * 10**9, "test")) is None
    told = memory_warning(arguments, model, None, 1, Device.gpu(10**8, "test"))
    assert told is not None and "0.1 GB are usable" in told and "seq_length 256" in told and "primus plan" in told


def test_plan_knows_the_sizes_of_the_model_s_code():
    [real] = run_distributed(constants, 1)
    ours = {name: getattr(module, name) for module in (attention, output) for name in real if hasattr(module, name)}
    assert ours == real
