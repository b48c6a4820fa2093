"""Parameters, buffers and layers of every rank, against those of the model that is really built."""

from __future__ import annotations

import copy

import pytest

from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.peft.plan import adapter_plan
from primus_bridge.plan.layout import Layout
from primus_bridge.plan.memory import stage_memory
from primus_bridge.plan.parameters import whole_model
from primus_bridge.preflight import fit_to_model
from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.plan.ranks import held

LORA = {"peft": {"scheme": "lora", "dim": 4}}
BF16 = {"mixed_precision": "bf16_mixed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name of a case of family_models -> its folder, made once."""
    made: dict[str, str] = {}

    def get(name: str, **changes) -> str:
        key = f"{name} {changes}"
        if key not in made:
            place = tmp_path_factory.mktemp("model")
            family_models.build(name, **changes).config.save_pretrained(place)
            made[key] = str(place)
        return made[key]

    return get


def arguments(model: dict | None = None, **sections):
    made = arguments_for({"seq_length": 8, **(model or {})}, train={"global_batch_size": 8}, **sections)
    return made


def compare(runs, world_size: int) -> None:
    """runs: (model folder, arguments). Each rank's own numbers are those of its stage in the plan."""
    planned = []
    for folder, given in runs:
        model = HFModel.open(folder, weights=False)
        fit_to_model(given, model.architecture)
        adapters = adapter_plan(given.peft, model) if given.peft.scheme else None
        layout = Layout.of(given, model.architecture, world_size)
        family, arch = model.family, model.architecture
        planned.append((layout, stage_memory(given, family, arch, layout, adapters, cpu=True)))
    for rank, results in enumerate(run_distributed(held, world_size, runs)):
        for real, (layout, stages), (folder, given) in zip(results, planned, runs, strict=True):
            what = (rank, layout.describe(), folder, given.peft)
            chunks, stage = layout.of_stage(real.stage), stages[real.stage]
            assert [list(chunk.layers) for chunk in chunks] == real.layers, what
            assert [chunk.embedding for chunk in chunks] == real.embedding, what
            assert [chunk.output for chunk in chunks] == real.output, what
            assert (stage.parameters, stage.trainable) == (real.parameters, real.trainable), what
            assert (stage.weights, stage.gradients) == (real.weight_bytes, real.gradient_bytes), what
            if layout.data * layout.context == 1 or not given.ddp.use_distributed_optimizer:
                assert stage.optimizer == real.optimizer_bytes, what
            else:  # a share of a buffer may lie on what aligns the parameters
                assert real.optimizer_bytes <= stage.optimizer <= real.optimizer_bytes + 16384, what


def test_every_family_on_one_rank(folder):
    runs = []
    for name in family_models.CASES:
        runs += [(folder(name), arguments()), (folder(name), arguments(**LORA, **BF16))]
    compare(runs, 1)


LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 4},
    "tensor, pipeline": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "interleaved": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "uneven": {
        "pipeline_model_parallel_size": 4,
        "num_layers_in_first_pipeline_stage": 2,
        "num_layers_in_last_pipeline_stage": 4,
    },
    "context": {"context_parallel_size": 2, "tensor_model_parallel_size": 2},
}
EXPERT_LAYOUTS = {
    "expert": {"expert_model_parallel_size": 4},
    "expert in pipeline": {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "expert tensor": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "expert, tensor": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
}
ADAPTERS = {
    "all": {},
    "DoRA": {"use_dora": True},
    "named": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "fused": {"target_modules": ["linear_qkv", "linear_fc1"]},
}


def test_layouts_of_four_ranks(folder):
    """Tied embeddings, more ranks than groups, norms over split heads; full, LoRA and DoRA; either optimizer."""
    runs = []
    for layout in LAYOUTS.values():
        uneven = {"num_hidden_layers": 8} if "num_layers_in_first_pipeline_stage" in layout else {}
        for name in ("llama, tied, llama3 rope", "gpt2", "olmo2"):
            runs.append((folder(name, **uneven), arguments(layout)))
        if uneven or "context_parallel_size" in layout:
            continue
        for adapters in ADAPTERS.values():
            peft = {"scheme": "lora", "dim": 4, **adapters}
            runs.append((folder("llama, MQA"), arguments(layout, peft=peft, **BF16)))
        plain = {"ddp": {"use_distributed_optimizer": False}}
        runs.append((folder("llama"), arguments(layout, **plain, **BF16)))
    runs.append((folder("llama"), arguments(ddp={"grad_reduce_in_fp32": False}, **BF16)))
    compare(runs, 4)


def test_experts_of_four_ranks(folder):
    runs = []
    for layout in EXPERT_LAYOUTS.values():
        runs += [(folder("qwen2 moe"), arguments(layout)), (folder("deepseek_v3"), arguments(layout, **LORA))]
    compare(runs, 4)


def test_whole_model_is_what_transformers_counts():
    for name in ("llama", "qwen2, tied", "qwen3 moe", "deepseek_v3", "gpt2", "falcon, groups"):
        model = family_models.build(name)
        family = _family(model.config.to_dict())
        arch = family.architecture(model.config.to_dict())
        assert whole_model(family, arch) == sum(parameter.numel() for parameter in model.parameters()), name
        if arch.moe is None:
            assert whole_model(family, arch, active_only=True) == whole_model(family, arch)
        else:
            assert whole_model(family, arch, active_only=True) < whole_model(family, arch)


def _family(config: dict):
    from primus_bridge.conversion.families import family_of

    return family_of(copy.deepcopy(config), "config.json")
