"""In-flight micro-batches against Megatron's own schedule tables; the arithmetic of a step against torch's count."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from torch.utils.flop_counter import sdpa_flop_count

from primus_bridge.plan.layout import Layout
from primus_bridge.plan.schedule import Work, bubble, in_flight
from primus_bridge.plan.steps import Forward, count_steps
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


def waiting(virtual: int, micro_batches: int, *work: list[float]) -> float:
    """work: of the forward passes, by stage; the backward ones take twice as long."""
    return bubble(layout_of(len(work), virtual), [[Work(t, 2 * t) for t in stage] for stage in work], micro_batches)


@pytest.mark.parametrize(
    "stages, virtual, micro_batches",
    [(2, 1, 1), (4, 1, 8), (4, 1, 2), (8, 1, 1000), (2, 3, 6), (4, 2, 8), (4, 4, 4), (4, 5, 400)],
)
def test_stages_alike_wait_as_narayanan_says(stages, virtual, micro_batches):
    work = [[0.7] * virtual] * stages
    expected = (stages - 1) / (micro_batches * virtual + stages - 1)
    assert waiting(virtual, micro_batches, *work) == pytest.approx(expected)


def test_a_slow_stage_holds_up_all():
    assert waiting(1, 8, [3.0]) == 0
    # one micro-batch: forward and backward through each stage, one after the other
    assert waiting(1, 1, [1.0], [2.0], [3.0]) == pytest.approx(1 - 6 / (3 * 6))
    # all wait for the slowest: its work of each micro-batch, and at most once the others'
    for work in ([1, 39, 39, 1], [17, 22, 22, 19], [20, 20, 20, 26], [5, 1, 1, 1], [1, 1, 1, 5]):
        step = sum(work) + 255 * max(work)
        found = waiting(1, 256, *([each] for each in map(float, work)))
        assert 1 - sum(work) / (4 * max(work)) - 1e-9 < found < 1 - 256 * sum(work) / (4 * step) + 1e-9
    # a chunk without layers, as Megatron allows at the ends
    assert waiting(2, 8, [1.0, 1.0], [1.0, 0.0]) > waiting(2, 8, [1.0, 1.0], [1.0, 1.0])


def step_of(work: list[Work], micro_batches: int) -> float:
    """How long 1F1B takes: a pass ends after the stage's one before it and after the neighbour's that it needs."""
    last = len(work) - 1
    orders = []
    for stage in range(len(work)):
        forward, backward = ([(kind, number) for number in range(micro_batches)] for kind in (0, 1))
        ahead = min(last - stage, micro_batches)
        turns = [one for pair in zip(forward[ahead:], backward, strict=False) for one in pair]
        orders.append(forward[:ahead] + turns + backward[micro_batches - ahead :])

    @functools.cache
    def end(stage: int, kind: int, number: int) -> float:
        place, needed = orders[stage].index((kind, number)), []
        if place:
            needed.append(end(stage, *orders[stage][place - 1]))
        if kind == 0 and stage > 0:
            needed.append(end(stage - 1, 0, number))
        if kind == 1:
            needed.append(end(stage + 1, 1, number) if stage < last else end(stage, 0, number))
        return max(needed, default=0.0) + work[stage][kind]

    return max(end(stage, *order[-1]) for stage, order in enumerate(orders))


@pytest.mark.parametrize("micro_batches", [1, 3, 8, 60])
@pytest.mark.parametrize(
    "work",
    [
        [(1, 2), (39, 78), (39, 78), (1, 2)],
        [(17, 34), (22, 44), (22, 44), (19, 38)],
        [(20, 60), (20, 60), (20, 60), (26, 72)],  # recompute, but for the output layer
        [(5, 5), (1, 1)],
        [(2, 3), (7, 3), (1, 9)],
    ],
)
def test_uneven_stages_wait_as_their_passes_do(work, micro_batches):
    stages = [Work(*each) for each in work]
    busy = micro_batches * sum(map(sum, work)) / len(work)
    found = bubble(layout_of(len(work), 1), [[one] for one in stages], micro_batches)
    assert found == pytest.approx(1 - busy / step_of(stages, micro_batches), abs=1e-9)


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
    forward = Forward.of(model.family, arch, 32)
    weights, attention = forward.with_backward(full=True), 3 * sum(forward.attention)
    assert 32 * (weights - attention) == pytest.approx(counted, rel=1e-6)
    # its own formula of fused attention: queries and keys, then values; half of it is seen
    query = (1, arch.num_attention_heads, 32, arch.kv_channels)
    value = (*query[:3], arch.mla.v_head_dim if arch.mla else arch.kv_channels)
    assert forward.attention == (sdpa_flop_count(query, query, value) / 32 / 2,) * arch.num_layers
    # LoRA needs no gradients of the weights
    assert forward.with_backward(full=False) - attention == pytest.approx((weights - attention) * 2 / 3)
    layout = Layout.of(arguments, arch, 1)
    steps = count_steps(arguments, layout, None, forward, 32)
    assert steps.flops_per_step == pytest.approx(32 * weights) and steps.recomputed_per_step == 0
    # recompute runs layers again, never the output layer
    layers = sum(forward.weights) + sum(forward.attention)
    assert forward.work(arguments, layout.chunks[0]) == pytest.approx(
        (layers + forward.output, 2 * (layers + forward.output))
    )
    for recompute, again in {
        ("full", None, None): layers,
        ("full", "uniform", 2): layers,
        ("full", "block", 1): forward.weights[0] + forward.attention[0],
        ("selective", None, None): sum(forward.attention),
    }.items():
        model_arguments = arguments.model
        (
            model_arguments.recompute_granularity,
            model_arguments.recompute_method,
            model_arguments.recompute_num_layers,
        ) = recompute
        steps = count_steps(arguments, layout, None, forward, 32)
        assert steps.recomputed_per_step == pytest.approx(32 * again)
        # a rank recomputes in its backward pass; of LoRA no gradients of the weights
        for arguments.peft.scheme, full in (("lora", False), (None, True)):
            work = forward.work(arguments, layout.chunks[0])
            assert sum(work) == pytest.approx(forward.with_backward(full) + again)
            assert work.forward == pytest.approx(layers + forward.output)
