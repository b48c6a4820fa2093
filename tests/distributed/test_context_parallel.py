"""Context parallelism is exact: the same losses and gradient norms as one rank has, packed and unpacked."""

from __future__ import annotations

import pytest
import torch

from primus_bridge.megatron.context_parallel import own_chunks
from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for, pack_batch, synthetic_rows
from tests.distributed.rank_functions import losses_and_gradients, save_and_resume, train

STEPS = 10
VOCAB = family_models.COMMON["vocab_size"]
CP2 = {"context_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
LORA = {"scheme": "lora", "dim": 4, "alpha": 12.0}
# (ranks, model arguments, micro batch size)
LAYOUTS = {
    "CP2": (2, CP2, 2),
    "CP2 recompute full": (2, CP2 | FULL, 1),
    "CP4": (4, {"context_parallel_size": 4}, 4),
    "CP2 TP2 SP": (4, CP2 | TP2 | SP, 2),
    "CP2 PP2 recompute selective": (4, CP2 | PP2 | SELECTIVE, 2),
    "CP2 DP2": (4, CP2, 4),
}
# one step each
FAMILIES = {
    "gemma2": (2, CP2),
    "gpt2": (2, CP2),
    "phi3, window, partial rotary": (4, {"context_parallel_size": 4}),
    "mixtral": (4, CP2 | EP2 | TP2 | SP),
    "olmoe": (2, CP2 | EP2),
    "deepseek_v2": (2, CP2 | FULL),
}


def arguments(model: dict, packed: bool, **sections):
    return arguments_for(
        model,
        dataset={"packed_sequence": packed},
        optimizer={"lr": 1e-3},
        train={"train_iters": STEPS},
        **sections,
    )


def assert_same(results: list, want: list[dict]) -> None:
    for rank, result in enumerate(results):
        for step, (got, expected) in enumerate(zip(result, want, strict=True)):
            assert got["supervised_tokens"] == expected["supervised_tokens"]
            assert got["loss"] == pytest.approx(expected["loss"], rel=2e-5), (rank, step)
            assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), (rank, step)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = family_models.save("llama", tmp_path_factory.mktemp("llama"))
    single = run_distributed(train, 1, folder, [(arguments({}, packed=False), 2)], STEPS)[0][0]
    assert len({round(step["loss"], 4) for step in single}) == STEPS
    return folder, single


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_equal_the_single_rank_run(llama, layout):
    folder, single = llama
    ranks, model, micro_batch = LAYOUTS[layout]
    runs = [(arguments(model, packed), micro_batch) for packed in (False, True)]
    results = run_distributed(train, ranks, folder, runs, STEPS)
    for packed in (0, 1):
        assert_same([result[packed] for result in results], single)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_equals_its_single_rank_run(case, tmp_path):
    folder = family_models.save(case, tmp_path)
    ranks, model = FAMILIES[case]
    single = run_distributed(train, 1, folder, [(arguments({}, False), 2)], 1)[0][0]
    results = run_distributed(train, ranks, folder, [(arguments(model, packed), 2) for packed in (False, True)], 1)
    for packed in (0, 1):
        assert_same([result[packed] for result in results], single)


def test_bf16_agrees_to_its_precision(llama):
    folder, single = llama
    options = arguments(CP2, True)
    options.mixed_precision = "bf16_mixed"
    result = run_distributed(train, 2, folder, [(options, 2)], STEPS)[0][0]
    assert [step["loss"] for step in result] == pytest.approx([step["loss"] for step in single], rel=1e-2)


def test_a_rank_without_supervised_tokens(llama):
    """Loss on three tokens of one rank's chunk; every gradient is the single rank's."""
    folder, _ = llama
    batch = pack_batch(synthetic_rows(VOCAB, 2), 48)
    batch["loss_mask"].zero_()
    batch["loss_mask"][:, 5:8] = 1.0
    (loss, gradients) = run_distributed(losses_and_gradients, 1, folder, arguments({}, True), [[[batch]]])[0][0]
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.1
    for result in run_distributed(losses_and_gradients, 2, folder, arguments(CP2, True), [[[batch]]]):
        assert result[0][0] == pytest.approx(loss, rel=1e-6)
        for name, gradient in result[0][1].items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-5, msg=name)


def random_numbers() -> torch.Tensor:
    from primus_bridge.megatron.parallel import initialize

    initialize(arguments_for(CP2))
    return torch.rand(4)


def test_context_parallel_ranks_draw_different_numbers():
    first, second = run_distributed(random_numbers, 2)
    assert not torch.equal(first, second)


def test_adapters_train_the_same(llama):
    folder, _ = llama
    single = run_distributed(train, 1, folder, [(arguments({}, True, peft=LORA), 2)], 4)[0][0]
    results = run_distributed(train, 2, folder, [(arguments(CP2, True, peft=LORA), 2)], 4)
    assert_same([result[0] for result in results], single)


def test_checkpoints_go_between_context_parallel_sizes(llama, tmp_path):
    folder, single = llama
    two, one = arguments(CP2, True), arguments({}, True)
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    saved = run_distributed(save_and_resume, 2, folder, [(two, first, 0, 3, None)])[0]
    resumed = run_distributed(save_and_resume, 1, folder, [(one, again, 3, 6, first)])[0]
    back = run_distributed(save_and_resume, 2, folder, [(two, str(tmp_path / "back"), 6, STEPS, again)])[0]
    steps = [step for part in (saved, resumed, back) for job in part for step in job["steps"]]
    assert_same([steps], single)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_chunks_cover_the_sequence_once_with_equal_work(ranks):
    pieces = [own_chunks(64, rank, ranks) for rank in range(ranks)]
    positions = [[p for start, stop in own for p in range(start, stop)] for own in pieces]
    assert sorted(p for own in positions for p in own) == list(range(64))
    assert len({sum(own) for own in positions}) == 1


def long_attention(cp: int, window: int | None, block: int) -> torch.Tensor:
    """This rank's part of attention over 96 positions of two documents, and of its gradients; blocks of ``block``."""
    from types import SimpleNamespace

    from megatron.core import parallel_state

    from primus_bridge.conversion.architecture import Architecture
    from primus_bridge.megatron import core_attention
    from primus_bridge.megatron.context_parallel import own_part
    from primus_bridge.megatron.documents import Documents, Span
    from primus_bridge.megatron.parallel import initialize

    core_attention.QUERY_BLOCK = block
    parallel = initialize(arguments_for({"context_parallel_size": cp}))
    arch = Architecture("x", 1, 32, 32, 4, 2, 8, 10, 1e-6, 96, windows=(window,))
    group = parallel_state.get_context_parallel_group()
    core = core_attention.SDPACoreAttention(SimpleNamespace(attention_dropout=0.0), 1, arch, group)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(96, 1, heads, 8, generator=generator) for heads in (4, 2, 2)]
    own = [own_part(t, 0, parallel.cp_rank, cp).requires_grad_() for t in whole]
    out = core(*own, documents=Documents((Span(0, 0, 70), Span(0, 70, 90)), True))
    out.square().sum().backward()
    return torch.cat([t.flatten(1) for t in (out.detach(), *(t.grad for t in own))], dim=1)


@pytest.mark.parametrize("window", [None, 9])
def test_attention_in_blocks_of_queries(window):
    """Blocks smaller than a chunk, and documents across chunks."""
    (single,) = run_distributed(long_attention, 1, 1, window, 1024)
    for rank, part in enumerate(run_distributed(long_attention, 2, 2, window, 10)):
        want = torch.cat([single[start:stop] for start, stop in own_chunks(96, rank, 2)])
        torch.testing.assert_close(part, want, rtol=1e-5, atol=1e-5)
