"""What callbacks ask of the loop, and a signal that reaches one rank alone: every rank does the same."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from primus_bridge.callbacks.base import Callback, RunState
from tests.cli import example
from tests.distributed.harness import run_distributed


class Asking(Callback):
    """Asks for a checkpoint after step 2 and an evaluation after step 3, and sends a signal to a rank after step 4."""

    def __init__(self, pid: int):
        self.pid = pid
        self.seen: list[tuple[str, int]] = []

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step == 2:
            state.request_save()
        if state.step == 3:
            state.request_evaluation()
        if state.step == 4:
            os.kill(self.pid, signal.SIGUSR1)

    def on_eval_end(self, state: RunState, metrics: dict) -> None:
        self.seen.append(("evaluated", state.step))

    def on_save(self, state: RunState, path) -> None:
        self.seen.append(("saved", state.step))


class Late(Asking):
    """Sends the signal after the last step."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step == state.train_iters:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.5)  # until it has come


class Enough(Asking):
    """Asks for the end before the first step."""

    def on_train_start(self, state: RunState) -> None:
        state.request_stop("enough")


def trained(words: list[str], kind: type = Asking) -> dict:
    """The run of ``train`` with these words in this rank, rank 1 the one that gets the signal."""
    from primus_bridge.config import load_arguments
    from primus_bridge.registry import BackendRegistry

    arguments = load_arguments(None, words[1:], None)
    rank = int(os.environ["RANK"])
    Path(f"pid{rank}").write_text(str(os.getpid()))
    adapter = BackendRegistry.get_adapter(arguments.framework)
    adapter.prepare_backend(arguments)
    trainer = adapter.load_trainer_class(arguments.stage)(arguments, module_rank=rank, module_world_size=2)
    before = signal.getsignal(signal.SIGUSR1)
    trainer.setup()
    trainer.init()
    callback = kind(int(Path("pid1").read_text()))
    trainer.callbacks.append(callback)
    result = trainer.train()
    trainer.cleanup()
    assert signal.getsignal(signal.SIGUSR1) == before
    return {"step": result["step"], "seen": callback.seen}


def test_asked_by_a_callback_or_by_a_signal_to_one_rank(tmp_path):
    with example.workplace(tmp_path):
        rows = example.write_rows(tmp_path / "rows.json", example.alpaca_rows(40))
        words = example.train_words(
            "model", rows, "out", train_iters=12, tensor_model_parallel_size=2, validation_split=0.2
        )
        first, second = run_distributed(trained, 2, words)
    assert first["step"] == second["step"] and first["step"] in (4, 5)
    last = first["step"]
    # the save does not wait for an evaluation, which a signal leaves no time for
    assert first["seen"] == [("saved", 2), ("evaluated", 3), ("saved", last)]
    assert int((tmp_path / "out/latest_checkpointed_iteration.txt").read_text()) == last
    manifest = json.loads((tmp_path / f"out/iter_{last:07d}/manifest.json").read_text())
    assert manifest["step"] == last


def test_a_signal_after_the_last_step_saves_first_and_evaluates_all_the_same(tmp_path):
    with example.workplace(tmp_path):
        rows = example.write_rows(tmp_path / "rows.json", example.alpaca_rows(40))
        words = example.train_words(
            "model", rows, "out", train_iters=2, tensor_model_parallel_size=2, validation_split=0.2
        )
        first, _ = run_distributed(trained, 2, words, Late)
    assert first == {"step": 2, "seen": [("saved", 2), ("evaluated", 2)]}
    assert not (tmp_path / "out/stopped").exists()


def test_the_end_asked_for_before_the_first_step(tmp_path):
    with example.workplace(tmp_path):
        rows = example.write_rows(tmp_path / "rows.json", example.alpaca_rows(40))
        words = example.train_words("model", rows, "out", tensor_model_parallel_size=2, convert_to_hf=True)
        first, second = run_distributed(trained, 2, words, Enough)
    assert first == second == {"step": 0, "seen": []}
    assert (tmp_path / "out/hf/config.json").is_file() and not (tmp_path / "out/stopped").exists()
