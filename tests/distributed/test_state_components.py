"""State components on real ranks: who writes and reads each pattern, and failures of one rank that all raise."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from primus_bridge.checkpoint.components import SharingPattern, StateComponent
from primus_bridge.checkpoint.coordinator import Assets, CheckpointCoordinator, SaveOptions
from primus_bridge.checkpoint.manifest import Manifest, committed, find
from primus_bridge.checkpoint.sharing import Ranking, copies, file_name, own_copy
from primus_bridge.errors import ConfigError
from primus_bridge.files import file_digest
from primus_bridge.megatron.sharded_state import ModelState
from tests import tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.distributed.rank_functions import Built

P = SharingPattern
TP2 = {"tensor_model_parallel_size": 2}


class Box:
    """State of one value."""

    def __init__(self, value: Any):
        self.value = value

    def state_dict(self) -> dict:
        if isinstance(self.value, Exception):
            raise self.value
        return {"value": self.value, "nested": [{"tensor": torch.full((3,), float(len(str(self.value))))}]}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


class Reshaped(Box):
    def layout_changed(self, step: int) -> None:
        self.value = f"anew from step {step}"


class Rank(Built):
    """A tiny model on this rank, and the coordinator of its weights and more components."""

    def __init__(self, folder: str, layout: dict):
        super().__init__(folder, arguments_for(layout, train={"train_iters": 10}))
        self.assets = Assets([], self.model.architecture.hf_config)

    def saver(self, save: str, *more: StateComponent, **options) -> CheckpointCoordinator:
        usual = super().coordinator(save)
        return CheckpointCoordinator(
            Path(save), [*usual.components, *more], self.parallel.groups, SaveOptions(**options)
        )

    def manifest(self, step: int) -> Manifest:
        return Manifest(step, "model", True, "float32", "llama", layout=self.parallel.layout)

    def save(self, saver: CheckpointCoordinator, step: int) -> str:
        """The message of what it raised, or the folder's name."""
        try:
            saver.begin(self.manifest(step), self.assets)
            return saver.finish().name
        except ConfigError as error:
            saver.abandon()
            return str(error)


def boxes(rank: int, world: int) -> list[StateComponent]:
    """One of each pattern, whose value says who wrote it."""
    return [
        StateComponent("everybody", Box(f"by {rank}") if rank == 0 else None, P.GLOBAL),
        StateComponent("equal", Box("equal"), P.REPLICATED, validate_replication=True, validation_level="full"),
        StateComponent("own", Box(f"by {rank}"), P.PER_RANK),
        StateComponent("tensor", Box(f"by {rank}"), P.PER_GROUP, "tp_group"),
        StateComponent("data", Box(f"by {rank}"), P.PER_GROUP, "dp_group"),
        StateComponent("machine", Box(f"by {rank}"), P.PER_NODE),
    ]


def save_and_load(folder: str, layout: dict, save: str, nodes: int) -> dict:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["GROUP_RANK"] = str(rank * nodes // world)  # as torchrun says which machine this is
    built = Rank(folder, layout)
    before = boxes(rank, world)
    assert built.save(built.saver(save, *before), 1) == "iter_0000001"
    after = boxes(rank, world)
    for component in after:
        if component.stateful is not None:
            component.stateful.value = "nothing yet"
    built.saver(save, *after).load(find(Path(save)), built.parallel.layout)
    return {component.key: component.stateful and component.stateful.value for component in after}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_models.save("llama", tmp_path_factory.mktemp("components") / "hf"))


@pytest.mark.parametrize(
    ("ranks", "layout", "tensor", "data"),
    [(4, TP2, [0, 0, 2, 2], [0, 1, 0, 1]), (2, {}, [0, 1], [0, 0]), (2, TP2, [0, 0], [0, 1])],
)
def test_each_pattern_is_written_by_its_leader_and_read_by_its_members(ranks, layout, tensor, data, model, tmp_path):
    got = run_distributed(save_and_load, ranks, model, layout, str(tmp_path / "save"), 2)
    for rank, values in enumerate(got):
        assert values == {
            "everybody": "by 0" if rank == 0 else None,
            "equal": "equal",
            "own": f"by {rank}",
            "tensor": f"by {tensor[rank]}",
            "data": f"by {data[rank]}",
            "machine": f"by {rank - rank % (ranks // 2)}",
        }
    folder = find(tmp_path / "save").folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["checksums"] == {name: file_digest(folder / name) for name in manifest["files"]}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert there == set(manifest["files"])
    components = {entry["key"]: entry for entry in manifest["components"]}
    by_group = {
        "tensor": [f"state/tensor.tp_group_{leader:05d}.pt" for leader in sorted(set(tensor))],
        "data": [f"state/data.dp_group_{leader:05d}.pt" for leader in sorted(set(data))],
        "machine": ["state/machine.node_00000.pt", "state/machine.node_00001.pt"],
        "own": [f"state/own.rank_{rank:05d}.pt" for rank in range(ranks)],
        "equal": ["state/equal.pt"],
        "everybody": ["state/everybody.pt"],
        "model": [],
    }
    assert {key: components[key]["files"] for key in by_group} == by_group
    assert components["data"]["ranks"] == manifest["groups"]["dp_group"]
    assert components["model"]["pattern"] == "per_group" and components["rng"]["pattern"] == "per_rank"
    for entry in manifest["components"]:
        own = sum(manifest["files"][name] for name in entry["files"])
        assert entry["bytes"] == own if entry["files"] else entry["bytes"] > 100_000


def fail_one_by_one(folder: str, save: str, odd: int) -> dict:
    """What each rank says to a failure that only the rank ``odd`` has."""
    rank = int(os.environ["RANK"])
    built, says = Rank(folder, TP2 if os.environ["WORLD_SIZE"] == "4" else {}), {}
    mine = rank == odd

    def component(value: Any, pattern: P = P.REPLICATED, **options) -> StateComponent:
        return StateComponent("extra", Box(value), pattern, **options)

    says["good"] = built.save(built.saver(save, component("same")), 1)
    checked = {"validate_replication": True, "validation_level": "tensor"}
    says["differs"] = built.save(built.saver(save, component("other" if mine else "same", **checked)), 2)
    broken = component(ValueError("no state today") if mine else "fine", P.PER_RANK)
    says["raises"] = built.save(built.saver(save, broken), 3)
    broken = component(ValueError("none to compare") if mine else "fine", validate_replication=True)
    says["compared"] = built.save(built.saver(save, broken), 3)
    unsafe = component(deque([1]) if mine else "fine", P.PER_RANK)
    says["unsafe"] = built.save(built.saver(save, unsafe), 3)
    if built.parallel.tp_size > 1:
        norm = next(p for name, p in built.parameters().items() if "layernorm" in name or "layer_norm" in name)
        with torch.no_grad():
            norm[0] += float(mine)
        model = StateComponent(
            "model",
            ModelState(built.wrapped),
            P.PER_GROUP,
            "dp_group",
            validate_replication=True,
            metadata={"format": "torch_dist"},
        )
        says["copies"] = built.save(CheckpointCoordinator(Path(save), [model], built.parallel.groups), 3)
        with torch.no_grad():
            norm[0] -= float(mine)
    for asynchronous in (False, True):
        saver = built.saver(save, component("same"), asynchronous=asynchronous)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if mine:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        says["full", asynchronous] = built.save(saver, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not saver.pending
    try:
        more = [component("mine alone")] if mine else []
        built.saver(save, *more)
    except ConfigError as error:
        says["declared"] = str(error)
    says["again"] = built.save(built.saver(save, component("same")), 5)
    path = Path(save) / "iter_0000005" / "state" / f"rng.rank_{rank:05d}.pt"
    if mine:
        path.write_bytes(path.read_bytes()[:-7])
    try:
        found = find(Path(save) / "iter_0000001")  # its own sizes are right
        found = type(found)(path.parent.parent, found.manifest)
        built.saver(save, component("same")).load(found, built.parallel.layout)
    except ConfigError as error:
        says["damaged"] = str(error)
    return says


@pytest.mark.parametrize(("ranks", "odd"), [(2, 1), (4, 3), (4, 0)])
def test_what_one_rank_has_wrong_every_rank_says(ranks, odd, model, tmp_path):
    save = tmp_path / "save"
    says, *others = run_distributed(fail_one_by_one, ranks, model, str(save), odd)
    assert others == [says] * (ranks - 1)
    assert says["good"] == "iter_0000001" and says["again"] == "iter_0000005"
    assert f"{odd}" in says["differs"] and "extra" in says["differs"]
    assert "state component 'extra': Box.state_dict failed: ValueError: no state today" in says["raises"]
    assert "state component 'extra': Box.state_dict failed: ValueError: none to compare" in says["compared"]
    assert "what Box.state_dict() returns: " in says["unsafe"] and "deque" in says["unsafe"]
    if ranks == 4:
        # of two copies the lower rank's counts as right
        assert f"model: rank {odd or odd + 2} differs from rank" in says["copies"] and "layernorm" in says["copies"]
    for asynchronous in (False, True):
        assert "cannot write a checkpoint: File too large" in says["full", asynchronous]
    assert "declare different state components: extra" in says["declared"]
    assert f"rng.rank_{odd:05d}.pt" in says["damaged"]
    assert sorted(path.name for path in save.glob("iter*")) == ["iter_0000001", "iter_0000005"]
    assert len(committed(save)) == 2


def resume_elsewhere(folder: str, save: str, layout: dict, first: bool) -> Any:
    built = Rank(folder, layout)
    own = StateComponent("own", Box("saved"), P.PER_RANK)
    rule = StateComponent("rule", Reshaped("saved"), P.PER_RANK)
    optional = StateComponent("optional", Box("not saved"), P.PER_RANK, required=False)
    gone = StateComponent("gone", Box("saved"), P.REPLICATED)
    if first:
        return built.save(built.saver(save, own, rule, gone), 7)
    found = find(Path(save))
    lines = built.saver(save, rule, optional).load(found, built.parallel.layout)
    says = [rule.stateful.value, optional.stateful.value, lines]
    says += built.saver(save, StateComponent("gone", Box(0), P.PER_RANK, required=False)).load(
        found, built.parallel.layout
    )[-1:]
    nowhere = StateComponent("nowhere", Box(0) if built.parallel.rank else None, P.GLOBAL)
    for component in (
        own,
        StateComponent("gone", Box(0), "per_group", "dp_group"),
        StateComponent("needed", Box(0), P.PER_RANK),
        nowhere,
    ):
        try:
            built.saver(save, component).load(found, built.parallel.layout)
        except ConfigError as error:
            says.append(str(error))
    return says


def test_another_layout_has_other_ranks(model, tmp_path):
    save = str(tmp_path / "save")
    run_distributed(resume_elsewhere, 2, model, save, TP2, True)
    says = run_distributed(resume_elsewhere, 2, model, save, {}, False)
    for rule, optional, lines, other, own, pattern, needed, nowhere in says:
        assert rule == "anew from step 7" and optional == "not saved"
        assert "note: state component gone of the checkpoint is not this run's" in lines
        assert "note: the checkpoint has no state component optional; it starts anew" in lines
        assert "belongs to the ranks [[0], [1]] of another layout" in own
        assert other == "note: state component gone was saved as replicated, this run has it per_rank; it starts anew"
        assert "was saved as replicated, this run has it per_group of dp_group: declare it as before, or req" in pattern
        assert "has no needed, which this run continues with" in needed
        assert nowhere.startswith("state component 'nowhere': its pattern is global, so rank 0 writes it, and has none")


def change_while_writing(folder: str, save: str) -> tuple[dict, dict, list]:
    """The weights and moments at a save, what the asynchronous checkpoint holds, and what is pending when."""
    built = Rank(folder, {})
    built.steps(0, 2)
    saver = built.saver(save, asynchronous=True)
    pending = [saver.pending]
    saver.begin(built.manifest(2), built.assets)
    pending.append(saver.pending)
    before = {name: parameter.detach().clone() for name, parameter in built.parameters().items()}
    built.steps(2, 4)  # changes every weight and moment in place
    saver.finish()
    pending.append(saver.pending)
    saver.begin(built.manifest(4), built.assets)  # into the same staged copies
    saver.finish()
    losses = built.steps(4, 6)
    saver.load(find(Path(save) / "iter_0000002"), built.parallel.layout)
    loaded = {name: parameter.detach().clone() for name, parameter in built.parameters().items()}
    again = built.steps(2, 6)
    return before, loaded, [pending, (losses, again)]


def test_an_asynchronous_save_holds_the_state_at_its_beginning(model, tmp_path):
    for before, loaded, (pending, same_losses) in run_distributed(change_while_writing, 2, model, str(tmp_path)):
        assert all(torch.equal(before[name], loaded[name]) for name in before)
        assert pending == [False, True, False]
        assert same_losses[0] == same_losses[1][2:]


def test_files_are_named_by_what_no_reader_depends_on():
    ranking = Ranking(4, {"tp_group": [(0, 1), (2, 3)]}, [(0, 1, 2), (3,)])
    group = StateComponent("k", Box(0), P.PER_GROUP, "tp_group")
    assert [own_copy(group, ranking, rank) for rank in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert file_name(group, ranking, (2, 3)) == "state/k.tp_group_00002.pt"
    assert copies(StateComponent("k", Box(0), P.PER_NODE), ranking) == [(0, 1, 2), (3,)]
    with pytest.raises(ConfigError, match="'xp' is none of this run's: tp_group"):
        copies(StateComponent("k", Box(0), P.PER_GROUP, "xp"), ranking)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (dict(key="../out"), "letters, digits"),
        (dict(sharing_pattern=P.PER_GROUP), "process_group_name belongs to"),
        (dict(process_group_name="dp_group"), "process_group_name belongs to"),
        (dict(validation_level="some"), "must be one of none, quick, tensor, full"),
        (dict(metadata={"format": "torch_dist"}), "is for model and optimizer"),
        (dict(metadata={"since": {1}}), "its metadata is written as JSON"),
        (dict(sharing_pattern=P.PER_NODE, validate_replication=True), "it is for REPLICATED and PER_GROUP"),
        (dict(sharing_pattern="per_nod"), "'per_nod' is none - did you mean 'per_node'.; they are global, per_rank, "),
        (dict(stateful=object()), "a object has no state_dict and load_state_dict"),
    ],
)
def test_a_component_that_cannot_be(words, says):
    with pytest.raises(ConfigError, match=says):
        StateComponent(**{"key": "k", "stateful": Box(0), "sharing_pattern": P.REPLICATED, **words})
