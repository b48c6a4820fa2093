"""Disks that fill, folders that cannot be written, and saves in the background: a run goes on, or says why not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.callbacks.metrics import read_history
from primus_bridge.checkpoint.manifest import committed, latest
from primus_bridge.errors import ConfigError
from primus_bridge.files import file_digest
from tests.cli import example


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

    words = example.train_words("model", "rows.json", save, train_iters=6, save_interval=1, report=False, **options)
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


class Full(Callback):
    """While the run saves after these steps no file may grow above 20 kB, as on a disk that is full."""

    def __init__(self, *steps: int):
        self.steps = steps
        self.saved: list[str] = []

    def on_step_end(self, state: RunState, metrics: dict) -> None:
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
    whole, other = (latest(Path(save)).folder for save in ("whole", "background"))
    for name in json.loads((whole / "manifest.json").read_text())["files"]:
        if name.endswith(".distcp") or name.startswith("state/"):
            assert file_digest(whole / name) == file_digest(other / name), name


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
