"""The optimizer's state written slice by slice is what Megatron writes after a gather, and reads at any layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_tensors

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.megatron.optimizer_shards import TENSORS, optimizer_shards, rectangles
from tests import family_models, tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
ETP, VPP, CP = "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size"
SEQUENCE = {"sequence_parallel": True}  # which experts ask for
LORA = {"scheme": "lora", "dim": 4, "target_modules": ["q_proj", "linear_fc1", "o_proj"]}
# name: (ranks, model, layout, what else differs, the case whose checkpoint it reads as well as its own)
CASES = {
    "dp2": (2, "qwen2", {}, {}, "tp2"),
    "tp2": (2, "qwen2", {TP: 2}, {}, "pp2"),
    "pp2": (2, "qwen2", {PP: 2}, {}, "dp2"),
    "vpp2": (2, "qwen2", {PP: 2, VPP: 2}, {}, "tp2"),
    "cp2": (2, "qwen2", {CP: 2}, {}, "pp2"),
    "bf16 dp2": (2, "qwen2", {}, {"mixed_precision": "bf16_mixed"}, "dp2"),
    "lora dp2": (2, "qwen2", {}, {"peft": LORA}, "lora tp2"),
    "lora tp2": (2, "qwen2", {TP: 2}, {"peft": LORA}, "lora dp2"),
    "not distributed": (2, "qwen2", {TP: 2}, {"ddp": {"use_distributed_optimizer": False}}, None),
    "ep2": (2, "mixtral", {EP: 2}, {}, "tp2 ep2"),
    "tp2 ep2": (2, "mixtral", {TP: 2, EP: 2, ETP: 1} | SEQUENCE, {}, "tp2 etp2"),
    "tp2 etp2": (2, "mixtral", {TP: 2} | SEQUENCE, {}, "ep2"),
    "tp2 dp2": (4, "qwen2", {TP: 2}, {}, "pp2"),
    "ep2 dp2": (4, "mixtral", {EP: 2}, {}, "tp2 etp2"),
    "pp2 ep2": (4, "deepseek_v3", {PP: 2, EP: 2}, {}, None),
    "1": (1, "qwen2", {}, {}, "tp2 dp2"),
    "1 of experts": (1, "deepseek_v3", {}, {}, "pp2 ep2"),
}


def _arguments(case: str) -> BridgeArguments:
    _, _, layout, sections, _ = CASES[case]
    return arguments_for(layout, optimizer={"lr": 1e-3}, **sections)


def _tensors(optimizer) -> list[torch.Tensor]:
    """Of this rank's slice of each parameter: the three of TENSORS, live."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    held = [part._get_main_param_and_optimizer_states(p) for part in parts for p in part.model_param_gbuf_map]
    return [state[name].detach() for state in held for name in TENSORS]


def _read_by_megatron(built, folder: Path) -> None:
    """As Megatron reads it: all of it on every rank, which then cuts its slices."""
    from megatron.core import dist_checkpointing

    from primus_bridge.megatron.sharded_state import model_state, sharding_metadata

    weights = model_state(built.wrapped, bool(built.lora))
    optimizer = built.optimizer.sharded_state_dict(weights, is_loading=True, metadata=sharding_metadata())
    loaded = dist_checkpointing.load({"optimizer": optimizer}, str(folder))["optimizer"]
    for index, part in enumerate(built.optimizer.chained_optimizers):
        state = loaded if len(built.optimizer.chained_optimizers) == 1 else loaded[index]
        part.load_parameter_state_from_fully_reshardable(state["param_state"])


def _read_in_place(built, folder: Path) -> int:
    """As we read it; the numbers that this rank asked for."""
    from megatron.core import dist_checkpointing

    from primus_bridge.megatron.sharded_state import model_state, sharding_metadata

    weights = model_state(built.wrapped, bool(built.lora))
    _, shards = optimizer_shards(built.optimizer, weights, sharding_metadata(), loading=True)
    dist_checkpointing.load({"slices": shards}, str(folder))
    return sum(shard.data.numel() for shard in shards.values())


def _write(built, folder: Path, gathered: bool) -> int:
    """Returns how many of the state's numbers this rank writes of its slices."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import is_main_replica
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from primus_bridge.megatron.sharded_state import model_state, sharding_metadata

    weights = model_state(built.wrapped, bool(built.lora))
    state, slices = dict(weights), {}
    if gathered:
        state["optimizer"] = built.optimizer.sharded_state_dict(weights, metadata=sharding_metadata())
    else:
        state["optimizer"], slices = optimizer_shards(built.optimizer, weights, sharding_metadata())
        state["slices"] = slices
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder), TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1))
    return sum(shard.data.numel() for shard in slices.values() if is_main_replica(shard.replica_id))


def write_and_read(
    folders: dict[str, str], cases: list[str], root: str
) -> tuple[dict[str, int], dict[str, tuple[bool, int, int]]]:
    """Train, write both ways to root/CASE/{gathered,slices}; then read others' both ways.

    Of each case: numbers written; of each that reads: (the same to the bit, numbers read, numbers held).
    """
    from tests.distributed.rank_functions import Built

    wrote, read = {}, {}
    for case in cases:
        built = Built(folders[CASES[case][1]], _arguments(case))
        built.steps(0, 2)
        _write(built, Path(root) / case / "gathered", True)
        wrote[case] = _write(built, Path(root) / case / "slices", False)
        built.close()
    for case in cases:
        other = CASES[case][4]
        if other is None:
            continue
        built = Built(folders[CASES[case][1]], _arguments(case))
        # a fresh optimizer, as in a run that resumes
        asked = _read_in_place(built, Path(root) / other / "slices")
        ours = [tensor.clone() for tensor in _tensors(built.optimizer)]
        for tensor in _tensors(built.optimizer):
            tensor.fill_(math.nan)
        _read_by_megatron(built, Path(root) / other / "slices")
        theirs = _tensors(built.optimizer)
        same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        read[case] = (same, asked, sum(tensor.numel() for tensor in theirs))
        built.close()
    return wrote, read


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of the checkpoints, numbers written by case, what each rank read by case)."""
    root = tmp_path_factory.mktemp("shards")
    folders = {
        "qwen2": tiny_models.save("qwen2", root / "qwen2", tie_word_embeddings=True),
        "mixtral": family_models.save("mixtral", root / "mixtral"),
        # the first stage has no experts
        "deepseek_v3": family_models.save("deepseek_v3", root / "deepseek_v3", first_k_dense_replace=2),
    }
    wrote, read = {}, {}
    for ranks in (2, 4, 1):
        cases = [case for case in CASES if CASES[case][0] == ranks]
        by_rank = run_distributed(write_and_read, ranks, folders, cases, str(root))
        wrote |= {case: sum(own[case] for own, _ in by_rank) for case in by_rank[0][0]}
        read |= {case: [own[case] for _, own in by_rank] for case in by_rank[0][1]}
    return root, wrote, read


def _whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read without a job; NaN where nothing was written."""
    index = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        key: torch.full(entry.size, math.nan, dtype=entry.properties.dtype)
        for key, entry in index.items()
        if hasattr(entry, "size")
    }
    load_tensors(tensors, checkpoint_id=str(folder), no_dist=True)
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_slices_are_what_a_gather_writes(case, written):
    folder = written[0] / case
    want, got = _whole(folder / "gathered"), _whole(folder / "slices")
    assert set(got) == set(want)
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in got)
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key
    plain = [torch.load(folder / name / "common.pt", weights_only=True) for name in ("gathered", "slices")]
    assert plain[1].pop("slices", {}) == {}
    # the optimizer of a stage without experts leaves an empty one
    for state in [plain[0]["optimizer"], *plain[0]["optimizer"].values()]:
        assert not isinstance(state, dict) or state.pop("param_state", {}) == {}
    assert plain[0] == plain[1]


@pytest.mark.parametrize("case", [case for case in CASES if case != "not distributed"])
def test_each_number_is_written_once(case, written):
    index = FileSystemReader(str(written[0] / case / "slices")).read_metadata().state_dict_metadata
    state = [entry for key, entry in index.items() if key.startswith("optimizer.state.")]
    assert written[1][case] == sum(math.prod(entry.size) for entry in state)
    for entry in state:
        assert sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][4]])
def test_a_rank_reads_its_slices_of_another_layout_and_no_more(case, written):
    for same, asked, held in written[2][case]:
        assert same
        assert asked == held > 0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6), (2, 3, 4), (2, 1, 3, 2)])
def test_rectangles_are_the_range_and_few(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            found = list(rectangles(shape, start, stop))
            blocks = [
                numbers[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
                for offsets, sizes in found
            ]
            assert [number for block in blocks for number in block.flatten().tolist()] == list(range(start, stop))
            assert all(block.shape == torch.Size(sizes) for block, (_, sizes) in zip(blocks, found, strict=True))
            assert len(found) <= 2 * len(shape) - 1
