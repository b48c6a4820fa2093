"""Memory by phase, measured on real ranks: to the byte where it is counted, beside the plan where it is a peak."""

from __future__ import annotations

import pytest

from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.peft.plan import adapter_plan
from primus_bridge.plan.layout import Layout
from primus_bridge.plan.memory import stage_memory
from tests.distributed.harness import run_distributed
from tests.plan.ranks import phases
from tests.plan.test_memory import BF16, LLAMA, LORA, SEQUENCE, VIRTUAL, given, write_config

CASES = {
    1: {"full fine-tuning": ({}, {}, (2, 4)), "LoRA, bf16": ({}, {**BF16, **LORA}, (2, 2))},
    2: {"tensor and sequence parallel": (SEQUENCE, BF16, (2, 2)), "interleaved pipeline": (VIRTUAL, {}, (1, 4))},
}
"""ranks -> name -> (layout, other sections, (micro, global) batch)"""
STEPS = 256
"""Bytes that Adam's numbers of steps take beside its states, at most, and more."""


@pytest.mark.parametrize("ranks", CASES)
def test_what_is_measured_is_what_is_planned(ranks, tmp_path):
    folder = write_config(tmp_path / "model", LLAMA)
    model = HFModel.open(folder, weights=False)
    runs = [given(*case) for case in CASES[ranks].values()]
    for rank, measured in enumerate(run_distributed(phases, ranks, folder, runs)):
        for name, arguments, found in zip(CASES[ranks], runs, measured, strict=True):
            adapters = adapter_plan(arguments.peft, model) if arguments.peft.scheme else None
            layout = Layout.of(arguments, model.architecture, ranks)
            stages = stage_memory(arguments, model.family, model.architecture, layout, adapters, cpu=True)
            stage = stages[rank * layout.pipeline // ranks]
            assert (found.weights, found.gradients) == (stage.weights, stage.gradients), name
            assert 0 <= found.optimizer - stage.optimizer < 4 * STEPS, name
            assert found.activations == pytest.approx(stage.activations + stage.working, rel=0.15), name
            assert found.host == 0 and found.total == sum(found.metrics().values())
