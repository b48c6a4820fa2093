"""What a layer keeps for its backward pass, against what autograd keeps, for every family."""

from __future__ import annotations

from dataclasses import replace

import pytest

from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.peft.plan import adapter_plan
from primus_bridge.plan.layer import layer_work
from primus_bridge.plan.layout import Layout
from primus_bridge.plan.operations import MicroBatch, Operation, Work, backward
from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.plan.ranks import kept_by_layer

ROWS = 2
BF16 = {"mixed_precision": "bf16_mixed"}
KINDS = {"full, fp32": {}, "LoRA, bf16": {**BF16, "peft": {"scheme": "lora", "dim": 4}}}
MORE_KINDS = {
    "full, bf16": BF16,
    "DoRA with dropout": {"peft": {"scheme": "lora", "dim": 4, "dropout": 0.1, "use_dora": True}},
    "selective": {"recompute": "selective"},
}


@pytest.mark.parametrize("length", [64, 384])
def test_layers_keep_what_autograd_keeps(tmp_path, length):
    """64: below the lengths at which a CPU computes attention in fp32; 384: above, and several windows long."""
    some = ("llama", "gemma2", "mistral, window", "deepseek_v3", "gpt2")
    runs, planned = [], []
    for number, name in enumerate(family_models.CASES if length == 64 else some):
        folder = tmp_path / str(number)
        family_models.build(name, max_position_embeddings=512).config.save_pretrained(folder)
        for kind, sections in (KINDS | (MORE_KINDS if name in some else {})).items():
            recompute = {"recompute_granularity": sections.get("recompute")}
            others = {section: value for section, value in sections.items() if section != "recompute"}
            arguments = arguments_for({"seq_length": length, **recompute}, train={"micro_batch_size": ROWS}, **others)
            model = HFModel.open(str(folder), weights=False)
            arch = model.architecture
            adapters = adapter_plan(arguments.peft, model) if arguments.peft.scheme else None
            batch = MicroBatch.of(arguments, arch, Layout.of(arguments, arch, 1), True, adapters)
            planned.append(((name, kind), [layer_work(batch, layer).kept for layer in range(arch.num_layers)]))
            runs.append((str(folder), arguments))
    [real] = run_distributed(kept_by_layer, 1, runs, ROWS)
    for (what, ours), theirs in zip(planned, real, strict=True):
        # left out are numbers a position or a head, routers, the first keys of windows: more of a tiny model
        assert ours == pytest.approx(theirs, rel=0.08), what


def test_going_backward_frees_what_was_kept():
    """Of three operations two keep the same: it goes with the first of them, and what is later gone earlier."""
    first = Operation({"x": 100}, gradient_in=10, gradient_out=10)
    middle = Operation({"x": 100}, gradient_in=10, gradient_out=10, weight=150)
    last = Operation({"y": 100}, gradient_in=10, gradient_out=10, weight=50, scratch=5)
    assert backward([first, last], held=7) == Work(kept=200, peak=200 + 7 + 75)
    assert backward([first, middle, last], held=7) == Work(kept=200, peak=200 + 7 + 75)
    larger = replace(middle, weight=300)
    assert backward([first, larger, last], held=7) == Work(kept=200, peak=100 + 7 + 320)
