"""The project's first test: numbers do not depend on the layout."""

from __future__ import annotations

import pytest

from tests import tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.distributed.rank_functions import train

STEPS = 10
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
# name -> (model arguments, micro batch size), by number of ranks
LAYOUTS = {
    1: {
        "micro batch 4": ({}, 4),
        "recompute full": ({"recompute_granularity": "full"}, 2),
        "recompute selective": ({"recompute_granularity": "selective"}, 2),
    },
    2: {
        "TP2": (TP2, 1),
        "TP2 micro batch 4": (TP2, 4),
        "PP2": (PP2, 1),
        "DP2": ({}, 1),
        "DP2 micro batch 4": ({}, 4),
        "TP2+SP": (TP2 | SP, 2),
        "PP2 virtual 2": (PP2 | {"virtual_pipeline_model_parallel_size": 2}, 2),
        "PP2 uneven 1+3": (PP2 | {"num_layers_in_first_pipeline_stage": 1}, 2),
        "TP2+SP recompute full": (TP2 | SP | {"recompute_granularity": "full"}, 2),
    },
    4: {
        "TP2xPP2": (TP2 | PP2, 2),
        "TP2xPP2+SP virtual 2": (TP2 | PP2 | SP | {"virtual_pipeline_model_parallel_size": 2}, 4),
        "TP2xDP2+SP": (TP2 | SP, 2),
        "TP4": ({"tensor_model_parallel_size": 4}, 2),
        "PP2xDP2": (PP2, 2),
    },
}
MODELS = {"llama": {}, "qwen2": {"tie_word_embeddings": True}}


def _arguments(model: dict):
    return arguments_for(model, optimizer={"lr": 1e-3}, train={"train_iters": STEPS})


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    folder = tiny_models.save(request.param, tmp_path_factory.mktemp(request.param), **MODELS[request.param])
    return folder, run_distributed(train, 1, folder, [(_arguments({}), 1)], STEPS)[0][0]


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_losses_and_gradient_norms_equal_the_single_rank_run(model, ranks):
    folder, single = model
    layouts = LAYOUTS[ranks]
    runs = [(_arguments(arguments), micro_batch) for arguments, micro_batch in layouts.values()]
    # the runs differ from step to step, or the comparison would show nothing
    assert len({round(step["loss"], 4) for step in single}) == STEPS
    for rank, results in enumerate(run_distributed(train, ranks, folder, runs, STEPS)):
        for name, result in zip(layouts, results, strict=True):
            for step, (got, want) in enumerate(zip(result, single, strict=True)):
                where = f"{name}, rank {rank}, step {step}"
                assert got["supervised_tokens"] == want["supervised_tokens"], where
                assert got["loss"] == pytest.approx(want["loss"], rel=1e-4), where
                assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4), where


def test_with_and_without_the_distributed_optimizer(model):
    folder, single = model
    runs = []
    for distributed in (True, False):
        arguments = _arguments(TP2)
        arguments.ddp.use_distributed_optimizer = distributed
        runs.append((arguments, 2))
    for result in run_distributed(train, 4, folder, runs, STEPS)[3]:
        assert [step["loss"] for step in result] == pytest.approx([step["loss"] for step in single], rel=1e-4)


def test_bf16_is_the_same_training_at_every_layout(model):
    """bf16 rounds differently at another layout, so losses agree to its precision, not to fp32's."""
    folder, single = model
    runs = []
    for layout in ({}, TP2 | SP, PP2):
        arguments = _arguments(layout)
        arguments.mixed_precision = "bf16_mixed"
        runs.append((arguments, 2))
    for result in run_distributed(train, 2, folder, runs, STEPS)[0]:
        assert [step["loss"] for step in result] == pytest.approx([step["loss"] for step in single], rel=1e-2)
