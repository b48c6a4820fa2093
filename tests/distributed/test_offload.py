"""Optimizer states in the host's memory: the same training, and checkpoints that either optimizer goes on from.

The ranks are a CPU's, where a run would not offload: Megatron's hybrid optimizer itself is made, as on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from primus_bridge.config.arguments import BridgeArguments
from tests import tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.distributed.rank_functions import Built, save_and_resume

HALF = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
WAYS = {
    "all": {"optimizer_cpu_offload": True},
    "half": HALF,
    "none of it": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.0},
    "overlapped": {**HALF, "overlap_cpu_optimizer_d2h_h2d": True},
}


def given(**optimizer) -> BridgeArguments:
    return arguments_for(
        {}, optimizer={"lr": 1e-3, **optimizer}, train={"train_iters": 4}, mixed_precision="bf16_mixed"
    )


def trained(folder: str, runs: list[BridgeArguments]) -> list[tuple[str, list[dict], float]]:
    """Of each arguments: (kind of the optimizer, its steps, the part of its numbers whose master is on the host)."""
    found = []
    for arguments in runs:
        built = Built(folder, arguments)
        steps = built.steps(0, 3)
        inner = built.optimizer.chained_optimizers[0].optimizer
        moved = sum(each.numel() for each in getattr(inner, "cpu_copys_map_gpu_param", {}))
        every = sum(each.numel() for group in inner.param_groups for each in group["params"])
        found.append((type(inner).__name__, steps, moved / every))
        built.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama"))


def test_the_same_steps_wherever_the_states_are(folder):
    runs = [given(), *(given(**way) for way in WAYS.values())]
    for (_, usual, _), *offloaded in run_distributed(trained, 2, folder, runs):
        parts = {}
        for name, (kind, steps, part) in zip(WAYS, offloaded, strict=True):
            assert kind == "HybridDeviceOptimizer" and steps == usual, name
            parts[name] = part
        assert parts["all"] == 1 and parts["none of it"] == 0
        assert parts["half"] == parts["overlapped"] and 0.5 <= parts["half"] < 0.8


def test_checkpoints_of_either_optimizer_go_on_with_either(folder, tmp_path):
    kinds = {"usual": given(), "half": given(**HALF)}
    jobs = [(given(), str(tmp_path / "unbroken"), 0, 4, None)]
    jobs += [(arguments, str(tmp_path / name), 0, 2, None) for name, arguments in kinds.items()]
    jobs += [
        (arguments, str(tmp_path / f"{name} from {other}"), 2, 4, str(tmp_path / other))
        for name, arguments in kinds.items()
        for other in kinds
    ]
    for unbroken, _, _, *resumed in run_distributed(save_and_resume, 2, folder, jobs):
        for (_, name, *_), job in zip(jobs[3:], resumed, strict=True):
            assert job["steps"] == unbroken["steps"][2:], name
            for key, weight in unbroken["weights"].items():
                assert torch.equal(job["weights"][key], weight), (name, key)


def fitted(arguments: BridgeArguments) -> tuple[list[str], bool]:
    from primus_bridge.megatron.parallel import fit_to_device

    arguments.sources["optimizer.optimizer_cpu_offload"] = "run.yaml:7"
    return fit_to_device(arguments), arguments.optimizer.optimizer_cpu_offload


def test_a_run_on_a_cpu_says_that_there_is_nothing_to_move():
    [(lines, offloads)] = run_distributed(fitted, 1, given(**HALF))
    assert lines == ["note: run.yaml:7: 'optimizer_cpu_offload' has no effect here: on a CPU all memory is the host's"]
    assert not offloads
