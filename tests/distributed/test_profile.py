"""--profile: which steps are traced, and the traces, tables and memory of a real run on two ranks."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from primus_bridge.megatron.profile import StepProfiler, profiled_steps
from tests.cli.command import Result, in_rank
from tests.cli.example import alpaca_rows, loss_lines, train_words, workplace, write_rows
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for


@pytest.mark.parametrize(
    ("asked", "done", "last", "steps"),
    [
        ((10, 12), 0, 100, [10, 11]),
        ((10, 12), 9, 100, [10, 11]),
        ((0, 2), 0, 100, [1]),
        ((10, 12), 0, 11, [10, 11]),
        ((10, 12), 0, 10, [9, 10]),  # too short: as late as it can be
        ((10, 20), 0, 4, [2, 3, 4]),
        ((10, 12), 0, 2, [2]),  # the first step of a process is another
        ((10, 12), 0, 1, [1]),
        ((10, 12), 10, 100, [20, 21]),  # resumed: counted from there
        ((10, 12), 98, 100, [100]),
        ((10, 12), 100, 100, []),
    ],
)
def test_the_steps_that_are_traced(asked, done, last, steps):
    profiling = {"use_pytorch_profiler": True, "profile_step_start": asked[0], "profile_step_end": asked[1]}
    arguments = arguments_for(train={"train_iters": last}, profiling=profiling)
    assert list(profiled_steps(arguments, done)) == steps
    arguments.profiling.use_pytorch_profiler = False
    assert not profiled_steps(arguments, done)


@pytest.mark.parametrize(
    ("last", "says"),
    [(2, "none: the run ended before step 5"), (4, "none: the run ended before step 5"), (5, "step 5 of each rank: ")],
    ids=["before the warm-up", "in the warm-up", "within"],
)
def test_a_run_that_ends_early_says_what_was_traced(tmp_path, last, says):
    profiling = {"use_pytorch_profiler": True, "profile_step_start": 5, "profile_step_end": 7}
    arguments = arguments_for(train={"train_iters": 9}, profiling=profiling, checkpoint={"save": str(tmp_path)})
    older = tmp_path / "profile" / "rank_0000.json.gz"
    older.parent.mkdir()
    older.write_text("of an older part")
    profiler = StepProfiler(arguments, 0, 0, [], SimpleNamespace(config=SimpleNamespace()))
    for step in range(1, last + 1):
        profiler.begin_step(step)
        profiler.end_step()
    profiler.close()
    assert profiler.written()[0].startswith(f"profile   {says}")
    assert (older.read_bytes() == b"of an older part") == (last < 5)


def command(words: list[str]) -> Result:
    return in_rank(words)


class Parts(NamedTuple):
    root: Path
    first: tuple[list[Result], dict[str, dict]]
    """What each rank of the first part did, and the traces after it."""
    again: tuple[list[Result], dict[str, dict]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pipeline of two ranks, saved at its fourth step of six and resumed from there; both parts with --profile."""
    with workplace(tmp_path_factory.mktemp("profile")) as root:
        write_rows(root / "rows.json", alpaca_rows(30))
        pipeline = {"pipeline_model_parallel_size": 2, "nproc": 2, "train_iters": 6, "save_interval": 4}
        words = [*train_words("model", "rows.json", "run", **pipeline), "--profile", "--logger.report", "true"]
        first = [*words, "--profile_step_start", "3", "--profile_step_end", "5", "--exit_after_save"]
        again = [*words, "--profile_ranks", "1", "--record_shapes"]
        parts = [(run_distributed(command, 2, words), traces(root)) for words in (first, again)]
        yield Parts(root, *parts)


def traces(root: Path) -> dict[str, dict]:
    """Of each trace: how often each phase is in it, and whether shapes are."""
    found = {}
    for path in sorted((root / "run/profile").glob("*.json.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        phases = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
        shapes = any("Input Dims" in event.get("args", {}) for event in events)
        found[path.name] = {"phases": phases, "shapes": shapes}
    return found


def test_a_trace_and_a_table_of_each_rank(run):
    ranks, found = run.first
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert list(found) == ["rank_0000.json.gz", "rank_0001.json.gz"]
    for trace in found.values():
        phases = trace["phases"]
        # two steps of four micro-batches
        assert phases["forward"] == phases["backward"] == 8
        assert phases["optimizer"] == 2 and phases["data"] >= 1 and phases["save"] >= 1
        assert not trace["shapes"]
    for rank in (0, 1):
        table = (run.root / f"run/profile/rank_000{rank}.txt").read_text()
        assert "aten::mm" in table and "Self CPU" in table
    out = ranks[0].out
    assert "profile   steps 3 to 4 of each rank: run/profile: open rank_*.json.gz at https://ui.perfetto.dev" in out
    assert "this run has not all of" not in out


def test_a_resumed_run_moves_the_steps_and_says_so(run):
    ranks, found = run.again
    assert [rank.code for rank in ranks] == [0, 0], ranks
    out = ranks[0].out
    assert "profile   step 6: this run has not all of steps 10 to 11" in out
    assert "profile   step 6 of rank 1: run/profile" in out
    assert found["rank_0001.json.gz"]["shapes"] and found["rank_0001.json.gz"]["phases"]["optimizer"] == 1
    assert not found["rank_0000.json.gz"]["shapes"]  # of the first part


def test_memory_of_every_rank_is_written(run):
    found = json.loads((run.root / "run/memory.json").read_text())
    assert found["step"] == 6 and found["device"] == "cpu" and len(found["planned"]["stages"]) == 2
    assert [(rank["rank"], rank["stage"]) for rank in found["ranks"]] == [(0, 0), (1, 1)]
    for rank in found["ranks"]:
        planned = found["planned"]["stages"][rank["stage"]]
        assert (rank["weights"], rank["gradients"]) == (planned["weights"], planned["gradients"])
        assert rank["activations"] > 0 and rank["total"] < rank["peak"]
    for line in loss_lines(run.root / "run"):
        for part in ("weights", "gradients", "optimizer", "activations", "buffers"):
            assert line[f"memory_{part}"] == found["ranks"][0][part] or part == "activations"
    out = run.first[0][0].out
    assert out.count("memory    ") == 1 and "MiB on rank 0: weights " in out
