"""Names of LoRA targets: each that is offered is accepted, and what all-linear leaves out is known."""

from __future__ import annotations

import pytest

from primus_bridge.config.arguments import PeftArguments
from primus_bridge.conversion.families import families
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.errors import ConfigError
from primus_bridge.peft.plan import AdapterPlan
from primus_bridge.peft.targets import adapted_parts, left_out, module_names
from tests import family_models


def opened(name: str, folder) -> HFModel:
    return HFModel.open(family_models.save(name, folder), weights=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2 moe", "deepseek_v2 lite"])
def test_each_name_that_is_offered_is_accepted(name, tmp_path):
    model = opened(name, tmp_path)
    arch = model.architecture
    offered = module_names(families()[arch.model_type])
    with pytest.raises(ConfigError) as refused:
        adapted_parts(["nothing"], model.family, arch)
    known = str(refused.value).partition("known: ")[2].split(", ")
    assert len(known) > 4 and known[-1] == "all-linear"
    for module in known:
        assert adapted_parts([module], model.family, arch), module
    # of the list of families, some are other models'
    assert set(offered) & set(known) == {module for module in known if "linear" not in module}


def test_what_all_linear_leaves_out(tmp_path):
    """DeepSeek's first layer is dense, between shared experts of the others."""
    model = opened("deepseek_v2 lite", tmp_path)
    left = left_out(["all-linear"], model.family, model.architecture)
    assert {"mlp.gate_proj", "mlp.down_proj", "shared_experts.up_proj"} <= set(left)
    assert left_out([*left, "all-linear"], model.family, model.architecture) == []
    assert left_out(["q_proj"], model.family, model.architecture) == []
    plan = AdapterPlan.of_arguments(
        PeftArguments(scheme="lora", target_modules=["all-linear", *left]), model.family, model.architecture
    )
    assert "model.layers.0.mlp.gate_proj" in plan.modules


def test_without_experts_all_linear_leaves_nothing_out(tmp_path):
    model = opened("llama", tmp_path)
    assert left_out(["all-linear"], model.family, model.architecture) == []
