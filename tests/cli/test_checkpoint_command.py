"""primus checkpoint: real checkpoints of two layouts, listed, verified, compared, thinned out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from primus_bridge.checkpoint.manifest import MANIFEST, iteration_folder, keep_as_best
from primus_bridge.cli.main import guarded, main
from tests import tiny_models
from tests.checkpoint.hostile import recommit
from tests.cli.command import ROOT
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.distributed.rank_functions import save_and_resume

SHARD = "__0_0.distcp"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """one/: steps 1 and 2 of one rank; again/: step 2 by the same; split/: the state of step 1, saved at TP2."""
    root = tmp_path_factory.mktemp("runs")
    folder = tiny_models.save("llama", root / "hf")
    one, again, split = (str(root / name) for name in ("one", "again", "split"))
    alone, tp2 = arguments_for({}), arguments_for({"tensor_model_parallel_size": 2})
    run_distributed(save_and_resume, 1, folder, [(alone, one, 0, 1, None), (alone, one, 1, 2, one)])
    run_distributed(save_and_resume, 1, folder, [(alone, again, 0, 2, None)])
    run_distributed(save_and_resume, 2, folder, [(tp2, split, 1, 1, one + "/iter_0000001")])
    return root


@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    """A copy of the runs, to stand in."""
    for name in ("one", "again", "split"):
        shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def primus(capsys):
    """The command in this process: exit code, stdout, stderr."""

    def run(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = guarded(lambda: main(["checkpoint", *line.split()]))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def copied(save: Path, step: int) -> None:
    """The checkpoint of step 2 once more, as that of another step."""
    recommit(Path(shutil.copytree(iteration_folder(save, 2), iteration_folder(save, step))), step=step)


def test_a_list_says_what_counts(place, primus):
    keep_as_best(place / "one" / "iter_0000001", 1, 0.5)
    (place / "one" / "iter_0000003" / "state").mkdir(parents=True)
    (place / "one" / "iter_0000004").mkdir()
    (place / "one" / "iter_0000004" / "common.pt").write_bytes(b"x" * 2000)
    copied(place / "one", 5)
    os.truncate(place / "one" / "iter_0000005" / SHARD, 10)
    code, out, _ = primus("ls one --json list.json")
    rows = [row.rstrip() for row in out.splitlines()]
    assert code == 0
    assert [row.split()[0] for row in rows[:6]] == ["step", "1", "2", "3", "4", "5"]
    assert rows[1].endswith("whole best") and "model, training run" in rows[1]
    assert [row.rpartition("  ")[2] for row in rows[2:6]] == ["whole", "half-written", "foreign", "damaged"]
    assert rows[6].startswith(f"iter_0000005 {SHARD} should have") and rows[6].endswith("it is 10 bytes")
    assert all(len(row) <= 80 for row in rows[:6])
    listed = json.loads(Path("list.json").read_text())
    assert [one["state"] for one in listed] == ["whole", "whole", "half-written", "foreign", "damaged"]
    assert listed[0]["best"] and listed[0]["manifest"]["step"] == 1 and listed[3]["manifest"] is None
    assert listed[3]["bytes"] == 2000


def test_one_checkpoint_in_full(place, primus):
    code, out, _ = primus("ls split/iter_0000001")
    assert code == 0
    for said in ("ranks      2 TP2", "state/rng.rank_00000.pt and 1 more", SHARD, "arguments", "shards, *.distcp"):
        assert said in out
    (place / "split" / "iter_0000001" / MANIFEST).unlink()
    assert "half-written" in primus("ls split/iter_0000001")[1]


def test_verify(place, primus):
    code, out, err = primus("verify one --all")
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["one/iter_0000001", "one/iter_0000002"]
    assert " whole, " in out and out.count("GB/s") == 2
    flip(place / "one" / "iter_0000001" / SHARD, 5000)
    assert primus("verify one")[0] == 0  # the newest is whole
    (place / "one" / "iter_0000002" / "mine.txt").write_text("x")
    code, out, _ = primus("verify one --all")
    assert code == 1
    assert out.splitlines()[:2] == ["one/iter_0000001: DAMAGED", f"  {SHARD} differs from its checksum"]
    assert "note: mine.txt is not in the manifest" in out
    assert primus("verify one/iter_0000001")[0] == 1


def test_the_same_steps_give_equal_checkpoints(place, primus):
    code, out, _ = primus("diff one again --tensors --json diff.json")
    assert code == 0, out
    parts = json.loads(Path("diff.json").read_text())
    assert {name: part["changes"] for name, part in parts.items()} == {"manifest": [], "state": [], "tensors": []}
    assert parts["tensors"]["compared"] > 30 and f"all {parts['tensors']['compared']} equal" in out


def test_another_layout_holds_the_same_tensors(place, primus):
    code, out, _ = primus("diff one/iter_0000001 split --tensors --json diff.json")
    parts = json.loads(Path("diff.json").read_text())
    changed = {change["name"]: (change["left"], change["right"]) for change in parts["manifest"]["changes"]}
    assert code == 1 and changed["layout.tensor"] == ("1", "2")
    assert "state/rng.rank_00001.pt: - -> there" in out
    # the embedding is padded to a multiple of the ranks in neither, so that every tensor has one shape
    assert parts["tensors"]["changes"] == []


def changed_shard(folder: Path, name: str, value: torch.Tensor) -> None:
    """Write another part of a tensor in place of the first that is stored."""
    import io

    from primus_bridge.checkpoint.shards import Shards

    shards = Shards(folder)
    first = shards.parts(name)[0].offsets
    where = shards._places[(name, first)]
    stream = io.BytesIO()
    torch.save(value, stream)
    assert len(stream.getvalue()) == where.length
    path = folder / where.relative_path
    data = bytearray(path.read_bytes())
    data[where.offset : where.offset + where.length] = stream.getvalue()
    path.write_bytes(data)


def test_differences_are_counted_and_measured(place, primus):
    from primus_bridge.checkpoint.shards import Shards

    folder = place / "again" / "iter_0000002"
    name = "decoder.final_layernorm.weight"
    changed = Shards(folder).load(name, (0,)).clone()
    changed[3] += 0.5
    changed[7] -= 0.25
    changed_shard(folder, name, changed)
    code, out, _ = primus("diff one again")
    assert code == 0  # without --tensors they are not read
    code, out, _ = primus("diff one again --tensors")
    assert code == 1
    assert f"{name}: float32 [64], 2 of 64 elements differ, by 0.5 at most" in out
    changed[3] = float("nan")
    changed_shard(folder, name, changed)
    assert "2 of 64 elements differ, by nan at most" in primus("diff one again --tensors")[1]
    code, out, _ = primus("diff one/iter_0000001 one/iter_0000002")
    assert code == 1
    assert "  step: 1 -> 2" in out and "state/scheduler.pt.num_steps" in out


def test_prune(place, primus):
    (place / "one" / "iter_0000003" / "state").mkdir(parents=True)
    code, out, _ = primus("prune one --keep 1 --dry_run")
    assert code == 0 and "would go  iter_0000001" in out and "iter_0000003  0 B (half-written)" in out
    assert len(list((place / "one").glob("iter_*"))) == 3
    assert primus("prune one --keep 1 --keep_every 1 --dry_run")[1].count("would go  ") == 1
    code, out, _ = primus("prune one --keep 1")
    assert code == 0 and out.splitlines()[-1].startswith("2 removed, ")
    assert [path.name for path in (place / "one").glob("*iter_*")].count("iter_0000002") == 1
    assert not list((place / "one").glob("*iter_0000001*")) and not list((place / "one").glob("*iter_0000003*"))
    assert primus("prune one --keep 1")[1] == "0 removed, 0 B; 1 is left in one\n"


def test_prune_keeps_what_is_whole(place, primus):
    one = place / "one"
    for step in (3, 4):
        copied(one, step)
    flip(one / "iter_0000004" / SHARD, 5000)
    (one / "iter_0000003").rename(one / "damaged_iter_0000003")
    row = primus("ls one")[1].splitlines()[1]
    assert row.split()[0] == "3" and row.rstrip().endswith("set aside")
    for line, verb in (("prune one --keep 1 --dry_run", "would go"), ("prune one --keep 1", "removed")):
        code, out, _ = primus(line)
        said = out.splitlines()
        assert code == 0
        assert said[0] == f"damaged  iter_0000004  stays, and is not counted: {SHARD} differs from its checksum"
        assert said[1].startswith(f"{verb}  iter_0000001  ") and said[2].startswith(f"{verb}  damaged_iter_0000003  ")
        assert said[2].endswith("B (set aside: damaged)") and said[3].startswith(f"2 {verb}, ")
        assert said[3].endswith("; 2 are left in one")
    assert sorted(path.name for path in one.glob("*iter_*") if path.is_dir()) == ["iter_0000002", "iter_0000004"]
    flip(one / "iter_0000002" / SHARD, 5000)
    code, out, err = primus("prune one --keep 1")
    assert (code, out) == (2, "") and "one: no checkpoint in it is whole, and none is removed: iter_0000004: " in err


def test_prune_leaves_the_folder_of_a_run_alone(place, primus):
    from primus_bridge.checkpoint.lock import RunLock

    with RunLock.acquire(place / "one"):
        code, out, err = primus("prune one --keep 1")
        assert (code, out) == (2, "") and "another run is using this folder" in err
        assert primus("prune one --keep 1 --dry_run")[0] == 0
    assert (place / "one" / "iter_0000001" / MANIFEST).is_file()


@pytest.mark.parametrize(
    "line, message",
    [
        ("verfy one", "unknown action 'verfy' - did you mean 'verify'?"),
        ("ls gone", "gone: no such folder"),
        ("ls empty", "empty: holds no checkpoints"),
        ("verify empty", "empty: holds no committed checkpoint"),
        ("diff one", "required: OTHER_DIR"),
        ("diff one empty", "empty: holds no committed checkpoint"),
        ("prune one", "give --keep N"),
        ("prune one --keep 0", "--keep must be above 0, got 0"),
        ("prune empty --keep 1", "empty: holds no committed checkpoint"),
        ("prune one/iter_0000001 --keep 1", "is one checkpoint; give its save folder, "),
        ("prune one --keep 1 --keep_evry 2", "unknown option '--keep_evry' - did you mean '--keep_every'?"),
        ("ls one --json no/such/file.json", "there is no folder"),
    ],
)
def test_user_errors(place, primus, line, message):
    (place / "empty").mkdir()
    code, out, err = primus(line)
    assert (code, out) == (2, "") and message in err and err.startswith("primus: ")
    assert len(list((place / "one").iterdir())) == 3 and not (place / "one/iter_0000001/.lock").exists()


def test_an_export_reads_the_checksums_first(runs, place, capsys):
    flip(place / "one" / "iter_0000002" / SHARD, 5000)
    words = "convert --convert_to_hf --load one/iter_0000002 --hf_save_path hf".split()
    assert guarded(lambda: main(words)) == 2
    assert f"one/iter_0000002: damaged checkpoint: {SHARD} differs from its checksum" in capsys.readouterr().err
    assert not Path("hf").exists()


def test_nothing_heavy_is_imported(place):
    code = (
        "import sys\nfrom primus_bridge.cli.main import main\n"
        "for line in ('--help', 'ls one', 'verify one', 'prune one --keep 1 --dry_run'):\n"
        "    assert main(['checkpoint', *line.split()]) == 0\n"
        "print([name for name in ('torch', 'megatron', 'transformers', 'numpy') if name in sys.modules])"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
