"""Replication checks on real ranks: what differs is found at its level, and every rank is told the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from primus_bridge.checkpoint.replication import check_replicas
from primus_bridge.checkpoint.summaries import Unknown, leaves, name_of, summarise
from tests import tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for

PASSED = "passed"
LEVELS = ("quick", "tensor", "full")
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


def adam(shape: tuple[int, ...] = (3, 5)) -> dict[str, Any]:
    """An optimizer's state as torch and Megatron nest it, with a tensor of every dtype."""
    numbers = torch.arange(math.prod(shape)).reshape(shape) % 2 + 1
    moments = {str(dtype).removeprefix("torch."): numbers.to(dtype) for dtype in DTYPES}
    return {
        "state": {0: {"step": torch.tensor(7.0), "exp_avg": numbers / 3, **moments}, 1: {"empty": torch.empty(0, 4)}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0, 1], "name": "all", "foreach": None}],
        "turned": (torch.arange(12.0).reshape(3, 4).t(), torch.arange(9.0)[1:8]),
        "host": {"rows": np.arange(6).reshape(2, 3), "rate": np.float32(0.5), "seen": {3, 1}, "raw": b"\x00\xff"},
        "nan": torch.tensor([math.nan, -0.0]),
    }


def told(group, level: str, *states: Any) -> str:
    """What this rank hears of components a, b, ... that hold ``states``."""
    from primus_bridge.checkpoint.replication import Replica
    from primus_bridge.together import SharedError

    try:
        check_replicas([Replica(key, state, group, level) for key, state in zip("abc", states, strict=False)])
    except SharedError as error:
        return error.message
    return PASSED


def flip(tensor: torch.Tensor, index: int = -1) -> None:
    """Change the last bit of one element."""
    whole = tensor.reshape(-1).view(torch.uint8).view(-1, tensor.element_size())
    whole[index, 0] ^= 1
    tensor.copy_(whole.reshape(-1).view(tensor.dtype).view(tensor.shape))


def hear(odd_ranks: list[int]) -> dict[str, str]:
    """One job, many states: what this rank is told of each; the ``odd_ranks`` hold something else."""
    import torch.distributed as dist

    from primus_bridge.checkpoint import replication, summaries

    dist.init_process_group("gloo")
    replication.CHUNK = summaries.CHUNK = 16  # tensors of these sizes in several pieces
    odd, heard = dist.get_rank() in odd_ranks, {}

    def case(name: str, level: str, *states: Any, group=None) -> None:
        heard[f"{name} {level}"] = told(group, level, *states)

    for level in LEVELS:
        case("equal", level, adam(), {"epoch": 3})
        for dtype in DTYPES:
            state, name = adam(), str(dtype).removeprefix("torch.")
            if odd:
                flip(state["state"][0][name])
            case(name, level, {"epoch": 3}, state)
        changes = {
            "view": lambda state: flip(state["turned"][1], 0),
            "zero": lambda state: state["nan"].__setitem__(1, 0.0),
            "missing": lambda state: state["state"].pop(1),
            "more": lambda state: state["state"].__setitem__(2, {"exp_avg": [torch.ones(2)]}),
            "dtype": lambda state: state["state"][0].__setitem__("exp_avg", state["state"][0]["exp_avg"].bfloat16()),
            "shape": lambda state: state["state"][0].__setitem__("exp_avg", state["state"][0]["exp_avg"].t()),
            "value": lambda state: state["param_groups"][0].__setitem__("lr", 1e-3),
            "key": lambda state: state["state"].__setitem__("0", state["state"].pop(0)),
            "array": lambda state: state["host"]["rows"].__setitem__((1, 2), 6),
            "set": lambda state: state["host"]["seen"].add(2),
            "order": lambda state: state.__setitem__("state", dict(reversed(state["state"].items()))),
            "custom": lambda state: state["host"].__setitem__("when", object()),
            "sparse": lambda state: state["host"].__setitem__("when", torch.eye(3).to_sparse()),
        }
        for name, change in changes.items():
            state = adam()
            if odd:
                change(state)
            case(name, level, state)
        words = torch.arange(8.0, dtype=torch.float64)
        case("moved", level, {"words": words.flip(0) if odd else words})
        many = {f"w{i}": torch.full((2,), float(odd) + i) for i in range(12)}
        case("many", level, many)
    case("unseen", "none", {"lr": dist.get_rank()})
    if dist.get_rank() == 1:
        case("others", "quick", {"lr": 1})
    else:
        case("others", "quick", {"lr": 1}, {"extra": 1})
    return heard


def agreed(results: list[dict[str, str]]) -> dict[str, str]:
    """What every rank was told, which is the same on all."""
    for rank, result in enumerate(results):
        assert result == results[0], f"rank {rank}"
    return results[0]


@pytest.mark.parametrize(
    ("ranks", "odd", "who"), [(2, [1], "rank 1 differs from rank 0"), (4, [3], "rank 3 differs from ranks 0, 1, 2")]
)
def test_what_differs_is_found_and_said_by_every_rank(ranks, odd, who):
    heard = agreed(run_distributed(hear, ranks, odd))
    assert heard["unseen none"] == PASSED
    assert "rank 0: a (quick), b (quick); rank 1: a (quick)" in heard["others quick"]
    for level in LEVELS:
        assert heard[f"equal {level}"] == PASSED
        assert heard[f"order {level}"] == PASSED
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            how = "1 of 15 elements, by " if level == "full" else "other bits"
            message = heard[f"{name} {level}"]
            assert f"not: b: {who} in b.state.0.{name} ({how}" in message and " more" not in message, message
        for name, leaf in {
            "view": "a.turned.1 ({})",
            "zero": "a.nan ({})",
            "missing": "a.state.1 (missing);",
            "more": "a.state.2 (missing on the others);",
            "dtype": "a.state.0.exp_avg (bfloat16 [3, 5], not float32 [3, 5]);",
            "shape": "a.state.0.exp_avg (float32 [5, 3], not float32 [3, 5]);",
            "value": "a.param_groups.0.lr (0.001, not 0.0001);",
            "key": "a.state.0 (missing), a.state.0 (missing on the others);",
            "array": "a.host.rows (other bits);",
            "set": "a.host.seen ({{1, 2, 3}}, not {{1, 3}});",
        }.items():
            measured = {"view": "1 of 7 elements, by 1.19209e-07 at most", "zero": "1 of 2 elements, by 0 at most"}
            how = measured.get(name, "") if level == "full" else "other bits"
            assert f"{who} in {leaf.format(how)}" in heard[f"{name} {level}"], heard[f"{name} {level}"]
        cannot = "state that ranks should hold alike cannot be compared: a.host.when on rank {} is {};"
        assert heard[f"custom {level}"].startswith(cannot.format(odd[0], "of type object"))
        assert heard[f"sparse {level}"].startswith(cannot.format(odd[0], "a sparse_coo tensor"))
        assert (heard[f"moved {level}"] == PASSED) == (level == "quick")
        assert "a.w7 (" in heard[f"many {level}"] and "a.w8" not in heard[f"many {level}"]
        assert " and 4 more; go on from the last checkpoint" in heard[f"many {level}"]
    assert "a.words (8 of 8 elements, by 7 at most)" in heard["moved full"]


def hear_in_groups() -> dict[str, str]:
    """Groups [0, 2] and [1, 3] hold different states, and only the second disagrees; then ranks stand alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, heard = dist.get_rank(), {}
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    alone = [dist.new_group([one]) for one in range(4)]
    for level in LEVELS:
        state = {"state": {0: {"exp_avg": torch.full((3,), float(rank % 2))}}}
        heard[f"groups {level}"] = told(groups[rank % 2], level, state)
        heard[f"alone {level}"] = told(alone[rank], level, {"rng": torch.tensor([rank])})
        if rank == 3:
            state["state"][0]["exp_avg"][1] = math.nan
        heard[f"second {level}"] = told(groups[rank % 2], level, {"same": 1}, state)
        if rank in (0, 1):
            state["state"][0]["exp_avg"][0] -= 0.25
        heard[f"both {level}"] = told(groups[rank % 2], level, state)
        heard[f"first {level}"] = told(None, level, {"w": torch.tensor([0.5 if rank == 0 else 2.0, 1.0])})
        heard[f"all {level}"] = told(None, level, {"w": torch.tensor([float(min(rank, 2))])})
    return heard


def test_groups_are_compared_each_in_itself():
    heard = agreed(run_distributed(hear_in_groups, 4))
    for level in LEVELS:
        one, two, nan, first, by_2 = ["other bits"] * 5
        if level == "full":
            one, two, nan, first, by_2 = (
                "1 of 3 elements, by 0.25 at most",
                "2 of 3 elements, by nan at most",
                "1 of 3 elements, by nan at most",
                "1 of 2 elements, by 1.5 at most",
                "1 of 1 elements, by 2 at most",
            )
        assert heard[f"groups {level}"] == heard[f"alone {level}"] == PASSED
        leaf = "b.state.0.exp_avg"
        assert f"not: b: rank 3 differs from rank 1 in {leaf} ({nan});" in heard[f"second {level}"]
        leaf = "a.state.0.exp_avg"
        assert (
            f"a: rank 2 differs from rank 0 in {leaf} ({one}); a: rank 3 differs from rank 1 in {leaf} ({two});"
            in (heard[f"both {level}"])
        )
        # the lowest rank alone is the odd one
        assert f"rank 0 differs from ranks 1, 2, 3 in a.w ({first});" in heard[f"first {level}"]
        # without it, what most hold is right
        assert f"rank 0 differs from ranks 2, 3 in a.w ({by_2});" in heard[f"all {level}"]
        assert "rank 1 differs from ranks 2, 3 in a.w (" in heard[f"all {level}"]


def hear_of_a_run(folder: str) -> list[str]:
    """What the ranks of a real data-parallel run hear: as it trained, then with one bit of one rank changed."""
    from primus_bridge.megatron.sharded_state import ModelState, OptimizerState
    from tests.distributed.rank_functions import Built

    # bf16: the optimizer has fp32 copies of the weights besides its moments
    arguments = arguments_for({}, ddp={"use_distributed_optimizer": False}, optimizer={"lr": 1e-3})
    arguments.mixed_precision = "bf16_mixed"
    built = Built(folder, arguments)
    built.steps(0, 2)
    model = ModelState(built.wrapped)
    optimizer, group = OptimizerState(built.optimizer, model), built.parallel.groups["dp_group"]

    def hear_once(level: str) -> str:
        return told(group, level, model.replicas()["dp_group"], optimizer.replicas()["dp_group"])

    said = [hear_once(level) for level in LEVELS]
    if built.parallel.dp_rank == 1:
        moments = built.optimizer.state_dict()["optimizer"]["state"]
        flip(moments[max(moments)]["exp_avg"], 5)
    said += [hear_once(level) for level in LEVELS]
    built.close()
    return said


def test_one_bit_of_a_trained_optimizer(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "hf")
    one, other = run_distributed(hear_of_a_run, 2, folder)
    assert one == other
    assert one[:3] == [PASSED] * 3
    for message in one[3:]:
        assert "not: b: rank 1 differs from rank 0 in b.optimizer.state." in message
        assert ".exp_avg (" in message and " more" not in message, message
    assert "(1 of " in one[5]


# --- leaves and summaries, without ranks


def test_every_leaf_has_a_path():
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "groups": [{"lr": 1.0, "betas": (1, 2)}], "none": None}
    assert [name_of(path) for path, _ in leaves(state, ("'optimizer'",))] == [
        "optimizer",
        "optimizer.state",
        "optimizer.state.0",
        "optimizer.state.0.exp_avg",
        "optimizer.groups",
        "optimizer.groups.0",
        "optimizer.groups.0.lr",
        "optimizer.groups.0.betas",
        "optimizer.groups.0.betas.0",
        "optimizer.groups.0.betas.1",
        "optimizer.none",
    ]
    assert len(dict(leaves({0: 1, "0": 1, (0,): 1, None: 1, "None": 1}))) == 6
    assert list(leaves(torch.Size([2, 3]))) == [((), torch.Size([2, 3]))]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (object(), "of type object"),
        ({1: {object()}}, "of type set"),
        ({object: 1}, "a key of type type"),
        (np.array([None]), "an array of Python objects"),
        (torch.ones(2, device="meta"), "a meta tensor"),
        (torch.eye(2).to_sparse(), "a sparse_coo tensor"),
    ],
)
def test_what_cannot_be_compared_is_not_passed_over(value, what):
    assert [leaf for _, leaf in leaves([value]) if isinstance(leaf, Unknown)] == [Unknown(what)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (1, "1"),
        ("a", b"a"),
        (b"a", bytearray(b"a")),
        ((1,), [1]),
        ({}, []),
        (None, "None"),
        (torch.float32, "torch.float32"),
        (torch.Size([1]), (1,)),
        (np.float64(1), 1.0),
        (np.float32(1), np.float64(1)),
        (np.zeros(2), np.zeros((2, 1))),
        (np.zeros(2, np.int64), np.zeros(2)),
        (np.zeros(1), torch.zeros(1, dtype=torch.float64)),
        ({1, 2}, {1, 3}),
        ({1}, frozenset({1})),
        ({(1, "a")}, {(1, "b")}),
        (torch.zeros(()), torch.zeros(1)),
        (torch.zeros(4, dtype=torch.int16), torch.zeros(4, dtype=torch.bfloat16)),
        ([torch.zeros(1), torch.ones(1)], [torch.ones(1), torch.zeros(1)]),
        ("a" * 99 + "b", "a" * 99 + "c"),
        ({"a": {}}, {}),
    ],
)
@pytest.mark.parametrize("level", ["quick", "tensor"])
def test_values_that_are_not_the_same(one, other, level):
    assert summarise("key", one, level) == summarise("key", one, level)
    assert summarise("key", one, level) != summarise("key", other, level)


@pytest.mark.parametrize("level", ["quick", "tensor"])
def test_every_single_bit_counts(level):
    for dtype in DTYPES:
        for size in (1, 3, 8):
            tensor = torch.arange(size).to(dtype)
            before = summarise("key", tensor, level)
            raw = tensor.view(torch.uint8)
            for bit in range(8 * len(raw)):
                raw[bit // 8] ^= 1 << bit % 8
                assert summarise("key", tensor, level) != before, (dtype, size, bit)
                raw[bit // 8] ^= 1 << bit % 8
            assert summarise("key", tensor, level) == before


@pytest.mark.parametrize("level", ["quick", "tensor"])
def test_how_a_tensor_lies_in_memory_is_no_difference(level):
    rows = torch.randn(4, 6)
    buffer = torch.cat([torch.zeros(3), rows.reshape(-1)])
    alike = [rows, rows.t().contiguous().t(), buffer[3:].view(4, 6), torch.nn.Parameter(rows)]
    assert all(summarise("key", tensor, level) == summarise("key", rows, level) for tensor in alike)
    turned = torch.randn(3, dtype=torch.complex64).conj()
    assert summarise("key", turned, level) == summarise("key", turned.resolve_conj().clone(), level)
