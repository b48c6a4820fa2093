"""Damage is found wherever it is, by all ranks together; what is removed is never what counts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from primus_bridge.checkpoint import integrity
from primus_bridge.checkpoint.integrity import check_together, damage, find_whole, unlisted
from primus_bridge.checkpoint.listing import entries
from primus_bridge.checkpoint.manifest import (
    MANIFEST,
    OLD_FORMAT,
    TRACKER,
    Checkpoint,
    Manifest,
    commit,
    committed,
    iteration_folder,
    keep_as_best,
    manifest_checksum,
    open_checkpoint,
    read_manifest,
)
from primus_bridge.checkpoint.pruning import clean_uncommitted, prune, remove, set_aside, uncommitted
from primus_bridge.errors import ConfigError
from tests.distributed.harness import run_distributed

SHARDS = {"__0_0.distcp": 5000, "__1_0.distcp": 4000, "state/trainer.pt": 300, "hf_assets/config.json": 20}


def make(save: Path, *steps: int) -> None:
    for step in steps:
        folder = iteration_folder(save, step)
        for name, size in SHARDS.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(os.urandom(size))
        manifest = Manifest(step, "model", training_state=True, params_dtype="float32", model_type="llama")
        manifest.arguments = {"scheduler": {"betas": (0.9, 0.95)}, "mixture": {1: "a"}}
        commit(folder, manifest, {})


def flip(path: Path, place: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def altered(folder: Path, *, sign: bool = True, **values) -> None:
    """Change a manifest. sign: and make its checksum fit, as somebody would who means harm."""
    changed = json.loads((folder / MANIFEST).read_text()) | values
    (folder / MANIFEST).write_text(json.dumps(changed | ({"checksum": manifest_checksum(changed)} if sign else {})))


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(folder, read_manifest(folder))


@pytest.fixture
def save(tmp_path):
    make(tmp_path, 1, 2, 3)
    return tmp_path


@pytest.mark.parametrize(
    "harm, finding",
    [
        (lambda folder: flip(folder / "__1_0.distcp"), "__1_0.distcp differs from its checksum"),
        (lambda folder: flip(folder / "state/trainer.pt"), "state/trainer.pt differs from its checksum"),
        (lambda folder: os.truncate(folder / "__0_0.distcp", 4999), "__0_0.distcp should have 5000 bytes, it is 4999"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp should have 5000 bytes, it is missing"),
    ],
)
def test_damage_is_named_and_passed_over(save, harm, finding, capsys):
    newest = iteration_folder(save, 3)
    assert damage(opened(newest)) == [] and find_whole(save).folder == newest
    harm(newest)
    (found,) = damage(opened(newest))
    assert found.startswith(finding)
    assert find_whole(save).manifest.step == 2
    assert f"passing over {newest}: damaged checkpoint: {finding}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="damaged checkpoint"):
        find_whole(newest)  # an iteration that is named has no other in its place
    for step in (1, 2):
        flip(iteration_folder(save, step) / "__0_0.distcp")
    with pytest.raises(ConfigError, match="iter_0000001: damaged checkpoint: __0_0.distcp"):
        find_whole(save)


def test_without_checksums_only_sizes_are_looked_at(save):
    newest = iteration_folder(save, 3)
    flip(newest / "__0_0.distcp")
    assert find_whole(save, verify=False).folder == newest
    os.truncate(newest / "__0_0.distcp", 10)
    assert find_whole(save, verify=False).manifest.step == 2


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(save):
    folder = iteration_folder(save, 1)
    whole = (folder / MANIFEST).read_bytes()
    for place in range(0, len(whole), 3):
        flip(folder / MANIFEST, place)
        with pytest.raises(ConfigError, match="manifest.json: (differs from its checksum|is not a manifest)"):
            read_manifest(folder)
        (folder / MANIFEST).write_bytes(whole)
    assert damage(opened(folder)) == []


def test_nothing_of_an_altered_manifest_is_believed(save):
    altered(iteration_folder(save, 3), sign=False, consumed_samples=9)
    with pytest.raises(ConfigError, match="iter_0000003/manifest.json: differs from its checksum"):
        open_checkpoint(iteration_folder(save, 3))
    assert find_whole(save, verify=False).manifest.step == 2
    prune(save, 1)
    assert steps(save) == [2, 3]


COMPONENT = {"key": "rng", "pattern": "global", "group": None, "required": True, "ranks": [[0]], "bytes": 1}


@pytest.mark.parametrize(
    "values, finding",
    [
        ({"components": [COMPONENT | {"files": [5]}]}, "its components[0].files is no list[str]"),
        ({"components": [{"key": "rng"}]}, "it has no components[0].pattern"),
        ({"components": [7]}, "its components is no list[dict[str, typing.Any]]"),
        ({"layout": None}, "its layout is no dict[str, int]"),
        ({"step": True}, "its step is no int"),
        ({"step": "3"}, "its step is no int"),
        ({"files": {"a": 1.5}}, "its files is no dict[str, int]"),
        ({"peft": {"dropout": "0.1"}}, "its peft.dropout is no float"),
        ({"adapter": {"modules": {"q": [1]}, "config": {}}}, "its adapter.modules are not all a rank and an alpha"),
        ({"files": {"a\0b": 1}}, "embedded null byte"),
    ],
)
def test_values_of_another_kind(save, values, finding):
    altered(iteration_folder(save, 3), **values)
    (one,) = [one for one in entries(save) if one.folder.name == "iter_0000003"]
    assert one.state == "damaged" and one.findings == [f"is not a manifest of a checkpoint: {finding}"]
    assert find_whole(save).manifest.step == 2


def test_a_manifest_that_is_nested_too_deep(save):
    (iteration_folder(save, 3) / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not a manifest of a checkpoint: maximum recursion depth"):
        read_manifest(iteration_folder(save, 3))


def test_all_is_on_the_disk_before_the_manifest_is(save, monkeypatch):
    """And the manifest before the tracker: from then on older checkpoints may go."""
    done, sync, replace = [], os.fsync, os.replace
    folder = iteration_folder(save, 3)

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def renamed(source, target):
        done.append(f"{Path(target).name} stands")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    commit(folder, manifest, {"__0_0.distcp": manifest.checksums["__0_0.distcp"]})
    committed_at, tracked_at = (done.index(f"{name} stands") for name in (MANIFEST, TRACKER))
    others = {folder / name for name in SHARDS if name != "__0_0.distcp"}
    folders = {folder, folder / "state", folder / "hf_assets"}
    assert set(done[:committed_at]) == others | folders | {folder / f".{MANIFEST}.partial"}
    assert done[committed_at + 1 : tracked_at] == [folder, save, save / f".{TRACKER}.partial"]


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"step": 1}', "\xff", '{"format": "primus_bridge/9"}'])
def test_what_is_no_manifest(save, text):
    (iteration_folder(save, 3) / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="iter_0000003/manifest.json: is not a manifest of a checkpoint"):
        open_checkpoint(iteration_folder(save, 3))
    assert find_whole(save).manifest.step == 2


def test_an_older_manifest_has_sizes_alone(save):
    folder = iteration_folder(save, 3)
    values = json.loads((folder / MANIFEST).read_text())
    for name in ("checksum", "checksums", "components", "groups", "world_size", "arguments_digest", "base_digest"):
        del values[name]
    (folder / MANIFEST).write_text(json.dumps(values | {"format": OLD_FORMAT, "data": {"epoch": 1}}))
    assert damage(opened(folder)) == []
    os.truncate(folder / "state/trainer.pt", 3)
    assert damage(opened(folder)) == ["state/trainer.pt should have 300 bytes, it is 3 bytes"]


def test_files_that_nothing_names(save):
    folder = iteration_folder(save, 3)
    (folder / "state" / "notes.txt").write_text("mine")
    assert unlisted(opened(folder)) == ["state/notes.txt"]
    assert damage(opened(folder)) == []


def test_ranks_share_out_the_files(save):
    checkpoint = opened(iteration_folder(save, 3))
    for name in SHARDS:
        whole = (checkpoint.folder / name).read_bytes()
        flip(checkpoint.folder / name, 5)
        for ranks in (1, 2, 3, 8):
            found = [finding for rank in range(ranks) for finding in damage(checkpoint, rank, ranks)]
            assert found == [f"{name} differs from its checksum"]
        (checkpoint.folder / name).write_bytes(whole)
    read = [[], []]
    for rank in (0, 1):
        damage(checkpoint, rank, 2, progress=read[rank].append)
    assert [sum(counts) for counts in read] == [5000, 4320]


def in_ranks(save: str) -> list:
    """Both ranks' view: of damage in the share of one, of the newest whole one, of a folder without any, and of one
    that goes after rank 0 has looked at it."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    seen = [check_together(opened(iteration_folder(Path(save), 3))), find_whole(Path(save)).manifest.step]
    for path in (Path(save) / "empty", Path(save) / "iter_0000003"):
        try:
            find_whole(path)
        except ConfigError as error:
            seen.append(str(error))
    os.chdir(Path(save) / "views" / str(dist.get_rank()))
    try:
        find_whole(Path("save"))
    except ConfigError as error:
        seen.append(str(error))
    return seen


def test_every_rank_sees_what_one_of_them_finds(save):
    (save / "empty").mkdir()
    flip(iteration_folder(save, 3) / "__0_0.distcp")
    flip(iteration_folder(save, 3) / "__1_0.distcp")
    (iteration_folder(save, 2) / MANIFEST).write_text("{")
    for rank in (0, 1):
        make(save / "views" / str(rank) / "save", 1, 2)
    flip(save / "views/0/save/iter_0000002/__0_0.distcp")
    (save / "views/1/save/iter_0000002" / MANIFEST).unlink()
    first, second = run_distributed(in_ranks, 2, str(save))
    assert first == second
    assert sorted(first[0]) == [f"__{rank}_0.distcp differs from its checksum" for rank in (0, 1)]
    assert first[1] == 1
    assert "holds no committed checkpoint" in first[2] and "and 1 more" in first[3]
    assert first[4].startswith("save/iter_0000002: was removed while it was read")


def steps(save: Path) -> list[int]:
    return [int(folder.name.removeprefix("iter_")) for folder in committed(save)]


def test_what_pruning_keeps(tmp_path):
    make(tmp_path, *range(1, 9), 10_000_000)
    keep_as_best(iteration_folder(tmp_path, 5), 5, 0.1)
    assert [folder.name for folder in prune(tmp_path, 2, keep_every=4)] == [f"iter_000000{n}" for n in (1, 2, 3, 6, 7)]
    assert steps(tmp_path) == [4, 5, 8, 10_000_000]
    prune(tmp_path, 1)
    assert steps(tmp_path) == [5, 10_000_000]


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(save):
    os.truncate(iteration_folder(save, 3) / "__0_0.distcp", 7)
    prune(save, 1)
    assert steps(save) == [2, 3]


def test_what_was_just_committed_stays(save):
    """Though somebody has put a newer one there."""
    make(save, 9)
    prune(save, 1, up_to=3)
    assert steps(save) == [3, 9]


def test_a_checkpoint_under_another_name(save, capsys):
    copy = iteration_folder(save, 9)
    shutil.copytree(iteration_folder(save, 2), copy)
    finding = "holds step 2, and its folder is named for step 9: give it back its name, iter_0000002"
    with pytest.raises(ConfigError, match=f"iter_0000009: {finding}"):
        open_checkpoint(copy)
    assert [(one.state, one.findings) for one in entries(save)][-1] == ("damaged", [finding])
    assert find_whole(save).manifest.step == 3
    assert f"passing over {copy}: damaged checkpoint: {MANIFEST} {finding}" in capsys.readouterr().err
    prune(save, 1)
    assert steps(save) == [3, 9]
    # a copy elsewhere has no step in its name
    open_checkpoint(Path(shutil.copytree(copy, save / "release")))


def test_the_tracker_names_what_is_there(save):
    tracker = save / TRACKER
    set_aside(save, [iteration_folder(save, 3)])
    assert tracker.read_text() == "2"
    make(save, 3)
    remove([iteration_folder(save, 1)])
    assert tracker.read_text() == "3"
    remove([iteration_folder(save, 3)])
    assert tracker.read_text() == "2"


def test_the_tracker_of_megatron_lm_is_its_own(save):
    foreign = iteration_folder(save, 5)
    foreign.mkdir()
    (foreign / "common.pt").write_bytes(b"x")
    for named in ("5", "release"):
        (save / TRACKER).write_text(named)
        set_aside(save, [iteration_folder(save, 3)])
        assert (save / TRACKER).read_text() == named
        make(save, 3)


def test_only_what_a_run_of_ours_left_is_cleaned(save):
    (iteration_folder(save, 2) / MANIFEST).unlink()  # killed before the commit
    iteration_folder(save, 4).mkdir()  # killed as it began
    foreign = iteration_folder(save, 5)  # Megatron-LM's own have no manifest
    foreign.mkdir()
    (foreign / "common.pt").write_bytes(b"x")
    half_removed = save / ".iter_0000001.removed"
    iteration_folder(save, 1).rename(half_removed)
    aside = save / "damaged_iter_0000001"
    aside.mkdir()
    aside_half_removed = save / ".damaged_iter_0000002.removed"
    aside_half_removed.mkdir()
    found = [iteration_folder(save, 2), iteration_folder(save, 4), aside_half_removed, half_removed]
    assert uncommitted(save) == found and clean_uncommitted(save) == found
    assert sorted(save.iterdir()) == sorted(
        [iteration_folder(save, 3), foreign, aside, save / "latest_checkpointed_iteration.txt"]
    )


def test_a_checkpoint_that_goes_while_it_is_read(save, monkeypatch):
    digest = integrity.file_digest

    def removed_first(path, progress):
        shutil.rmtree(iteration_folder(save, 3), ignore_errors=True)
        return digest(path, progress)

    monkeypatch.setattr(integrity, "file_digest", removed_first)
    with pytest.raises(ConfigError, match="was removed while it was read"):
        find_whole(save)
