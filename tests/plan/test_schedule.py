"""In-flight micro-batches against Megatron's own schedule tables; the arithmetic of a step against torch's count."""

from __future__ import annotations

from collections import Counter

import pytest

from primus_bridge.plan.layout import Layout
from primus_bridge.plan.schedule import bubble, in_flight
from primus_bridge.plan.steps import count_steps, flops_per_token
from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.plan.ranks import schedule_tables, step_flops


def layout_of(stages: int, virtual: int) -> Layout:
    sizes = dict(tensor=1, context=1, data=1, expert=1, expert_tensor=1, expert_data=1)
    return Layout(**sizes, world_size=stages, pipeline=stages, virtual=virtual, sequence_parallel=False, chunks=())


def test_one_forward_one_backward():
    """Stage i of p holds p - i micro-batches, or all there are."""
    held = [in_flight(layout_of(4, 1), stage, 8) for stage in range(4)]
    assert held == [[Counter({0: 4})], [Counter({0: 3})], [Counter({0: 2})], [Counter({0: 1})]]
    assert in_flight(layout_of(4, 1), 0, 2) == [Counter({0: 2})]
    assert in_flight(layout_of(1, 1), 0, 8) == [Counter({0: 1})]


SHAPES = [(2, 2, 4), (2, 3, 6), (4, 2, 8), (4, 4, 4)]


def test_interleaved_as_megatron_orders_it():
    """Run the forward and backward passes of Megatron's table; the largest sets held are those of the plan."""
    [tables] = run_distributed(schedule_tables, 1, SHAPES)
    for (stages, virtual, micro_batches), (order, warmups) in zip(SHAPES, tables, strict=True):
        for stage in range(stages):
            forward = [chunk for _, chunk in order]
            backward = [virtual - 1 - chunk for chunk in forward]
            held, largest = Counter(forward[: warmups[stage]]), []
            for at, chunk in enumerate(forward[warmups[stage] :]):
                held[chunk] += 1
                largest.append(+held)
                held[backward[at]] -= 1
            largest = largest or [+held]
            planned = [+each for each in in_flight(layout_of(stages, virtual), stage, micro_batches)]
            assert all(each in largest for each in planned), (stages, virtual, stage)
            assert all(each in planned for each in largest), (stages, virtual, stage)


def test_bubble():
    assert bubble(layout_of(1, 1), 8) == 0
    assert bubble(layout_of(4, 1), 8) == pytest.approx(3 / 11)
    assert bubble(layout_of(4, 2), 8) == pytest.approx(3 / 19)


@pytest.mark.parametrize("name", ["llama", "qwen2, tied", "deepseek_v3"])
def test_arithmetic_is_what_torch_counts(name, tmp_path):
    """Products with weights of one forward and backward pass; torch does not count a CPU's fused attention."""
    from primus_bridge.conversion.model_folder import HFModel

    # a vocabulary without padding: all of it is multiplied
    family_models.build(name, vocab_size=256).config.save_pretrained(tmp_path)
    model = HFModel.open(str(tmp_path), weights=False)
    arguments = arguments_for({"seq_length": 32}, train={"global_batch_size": 1})
    [counted] = run_distributed(step_flops, 1, str(tmp_path), arguments)
    arch = model.architecture
    weights = flops_per_token(model.family, arch, 32, True)
    attention = 12 * arch.num_layers * arch.num_attention_heads * arch.kv_channels * 16
    assert 32 * (weights - attention) == pytest.approx(counted, rel=1e-6)
    # LoRA needs no gradients of the weights
    assert flops_per_token(model.family, arch, 32, False) - attention == pytest.approx((weights - attention) * 2 / 3)
    layout = Layout.of(arguments, arch, 1)
    assert count_steps(arguments, model.family, arch, layout, None).flops_per_step == pytest.approx(32 * weights)
