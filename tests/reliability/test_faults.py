"""Disks that fill, folders that cannot be written, and saves in the background: a run goes on, or says why not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.callbacks.metrics import read_history
from primus_bridge.checkpoint.manifest import committed, latest
from primus_bridge.errors import ConfigError
from primus_bridge.files import file_digest
from primus_bridge.report.notes import read_events
from tests.cli import example
from tests.full_disk import files_up_to


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    with example.workplace(tmp_path_factory.mktemp("faults")) as root:
        example.write_rows(root / "rows.json", example.alpaca_rows(40))
        yield root


def train(save: str, *callbacks: Callback, **options):
    """A run of this process."""
    from primus_bridge.config import load_arguments
    from primus_bridge.megatron.parallel import leave
    from primus_bridge.registry import BackendRegistry

    options = {"train_iters": 6, "save_interval": 1, "report": False} | options
    words = example.train_words("model", "rows.json", save, **options)
    arguments = load_arguments(None, words[1:], None)
    adapter = BackendRegistry.get_adapter(arguments.framework)
    adapter.prepare_backend(arguments)
    trainer = adapter.load_trainer_class(arguments.stage)(arguments)
    trainer.callbacks.extend(callbacks)
    try:
        return trainer.run()
    finally:
        leave()  # after an error the groups are still there


def losses(save: str) -> list[float]:
    return [line["loss"] for line in read_history(Path(save, "metrics.jsonl")) if "loss" in line]


def wait_for_writer() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()


class Full(Callback):
    """While the run saves after these steps no file may grow above 20 kB, as on a disk that is full."""

    def __init__(self, *steps: int):
        self.steps = steps
        self.saved: list[str] = []

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        wait_for_writer()  # each save has the disk of its own step
        limit = 20_000 if state.step in self.steps else resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def on_save(self, state: RunState, path) -> None:
        self.saved.append(Path(path).name)


@pytest.fixture
def files_may_be_large():
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_outlives_saves_that_fail(asynchronous, files_may_be_large, capsys):
    full, save = Full(3) if asynchronous else Full(2, 3, 5), f"outlives{asynchronous}"
    result = train(save, full, async_save=asynchronous)
    assert result["steps"] == 6
    assert "iter_0000006" in full.saved and "iter_0000001" in full.saved
    assert [path.name for path in committed(Path(save))] == full.saved
    out = capsys.readouterr().out
    assert "WARNING   " in out and "cannot write a checkpoint: File too large" in out
    assert "failed save 1 of the 3 in a row that end the run (max_save_failures)" in out
    if not asynchronous:
        assert full.saved == ["iter_0000001", "iter_0000004", "iter_0000006"]
        assert "failed save 2 of the 3" in out
    train("whole")
    assert losses(save) == losses("whole")


class NoRoom(Callback):
    """After the steps 1, 2 and 3 no file may hold more than metrics.jsonl with a part of one more line."""

    def __init__(self, save: str):
        self.path, self.room = Path(save, "metrics.jsonl"), ExitStack()
        self.seen: dict[int, bytes] = {}

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        wait_for_writer()
        self.seen[state.step] = self.path.read_bytes()
        if state.step == 1:
            self.room.enter_context(files_up_to(len(self.seen[1]) + 100))
        if state.step == 4:
            self.room.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_costs_a_run_no_line(asynchronous, capsys):
    save = f"lines{asynchronous}"
    full = NoRoom(save)
    with full.room:
        result = train(save, full, async_save=asynchronous, report=True, max_save_failures=9)
    assert result["steps"] == 6
    assert full.seen[1] == full.seen[2] == full.seen[4] and full.seen[1].count(b"\n") == 1  # no part of a line
    out = capsys.readouterr().out
    for name in ("metrics.jsonl", "memory.json"):
        assert out.count(f"what {name} lacks waits in memory") == out.count(f"{name} is written again") == 1
    assert [path.name[-1] for path in committed(Path(save))] == ["4", "5", "6"]
    train("whole")
    assert losses(save) == losses("whole") and len(losses(save)) == 6
    noted = [entry["event"] for entry in read_events(Path(save))]
    assert noted == ["start", "save", "save", "save", "end"]
    assert json.loads(Path(save, "memory.json").read_text())["step"] == 6


def test_too_many_failures_in_a_row_end_it(files_may_be_large):
    with pytest.raises(ConfigError, match=r"2 saves in a row have failed \(max_save_failures\), the run ends"):
        train("ends", Full(3, 4, 5), max_save_failures=2)
    assert latest(Path("ends")).manifest.step == 2


def test_the_save_that_a_run_ends_with_must_not_fail(files_may_be_large):
    with pytest.raises(ConfigError, match="cannot write a checkpoint: File too large"):
        train("last", Full(6))
    assert latest(Path("last")).manifest.step == 5


def test_no_room_is_said_before_anything_is_written(monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    with pytest.raises(ConfigError, match=r"it takes [\d.]+ MB and 0.05 MB are free; free space, keep fewer"):
        train("room")
    assert committed(Path("room")) == [] and not list(Path("room").glob("iter_*"))


class Stopped(Callback):
    """SIGTERM while the checkpoint of step 3 is being written."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def test_background_saves_are_the_same_run(capsys):
    train("whole")
    result = train("background", Stopped(), async_save=True, save_total_limit=2, keep_every=2)
    assert result["steps"] == 4 and "SIGTERM" in result["stop_reason"]
    assert [path.name[-1] for path in committed(Path("background"))] == ["2", "3", "4"]
    assert train("background", async_save=True, save_total_limit=2, keep_every=2)["steps"] == 6
    assert [path.name[-1] for path in committed(Path("background"))] == ["2", "4", "5", "6"]
    assert losses("background") == losses("whole")
    assert [(one["key"], one["pattern"]) for one in latest(Path("background")).manifest.components] == [
        ("model", "per_group"),
        ("optimizer", "per_rank"),
        ("scheduler", "replicated"),
        ("trainer", "replicated"),
        ("dataset", "replicated"),
        ("rng", "per_rank"),
    ]
    assert same_files("whole", "background") == {"common.pt", "__0_0.distcp"}


def same_files(one: str, other: str) -> set[str]:
    """Of two runs' newest checkpoints the shards that are equal; their other state must be."""
    first, second = (latest(Path(save)).folder for save in (one, other))
    names = [name for name in json.loads((first / "manifest.json").read_text())["files"]]
    same = {name for name in names if file_digest(first / name) == file_digest(second / name)}
    assert {name for name in names if name.startswith("state/")} <= same
    return {name for name in same if name == "common.pt" or name.endswith(".distcp")}


class Slow(Callback):
    """Holds the writer of a checkpoint back until two more steps are done."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        from primus_bridge.megatron import sharded_save

        if state.step == 1:
            self.write = sharded_save.ShardedSave.write
            self.go_on = threading.Event()

            def write(save, *args):
                self.go_on.wait()
                return self.write(save, *args)

            sharded_save.ShardedSave.write = write  # type: ignore[method-assign]
        if state.step == 3:
            sharded_save.ShardedSave.write = self.write  # type: ignore[method-assign]
            self.go_on.set()


def test_a_slow_writer_holds_the_state_of_its_step():
    """Of an optimizer that is not distributed too, whose state is in common.pt."""
    for save, callbacks in (("quick", []), ("slow", [Slow()])):
        train(save, *callbacks, async_save=True, save_interval=2, use_distributed_optimizer=False)
    first, second = (Path(save, "iter_0000002") for save in ("quick", "slow"))
    for name in json.loads((first / "manifest.json").read_text())["files"]:
        if name == "common.pt" or name.endswith(".distcp") or name.startswith("state/"):
            assert file_digest(first / name) == file_digest(second / name), name


def test_a_run_that_saves_weights_alone_goes_on_from_all_of_it():
    train("whole")
    train("alone", exit_after_save=True)
    assert train("alone", save_optim=False)["steps"] == 6
    assert losses("alone") == losses("whole")
    last = latest(Path("alone")).manifest
    assert not last.training_state and [one["key"] for one in last.components] == ["model"]


class Counting(Callback):
    """Has state of its own."""

    def __init__(self):
        self.steps: list[int] = []

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        self.steps.append(state.step)

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]


def test_a_callback_goes_on_where_it_was():
    train("counted", Counting(), Counting(), exit_after_save=True)
    one, two = Counting(), Counting()
    train("counted", one, two)
    assert one.steps == two.steps == [1, 2, 3, 4, 5, 6]
    files = latest(Path("counted")).manifest.files
    assert {"state/callback-Counting-1.pt", "state/callback-Counting-2.pt"} <= set(files)
