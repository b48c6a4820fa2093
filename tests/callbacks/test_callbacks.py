"""The eight hooks, the history of metrics.jsonl over kills and resumes, progress lines and the loss curve."""

from __future__ import annotations

import json
import math
import time

import pytest

from primus_bridge.callbacks import curve, progress
from primus_bridge.callbacks.base import Callback, CallbackList, RunState
from primus_bridge.callbacks.metrics import MetricsCallback, read_history
from primus_bridge.callbacks.progress import ProgressCallback
from primus_bridge.callbacks.report import ReportCallback
from primus_bridge.callbacks.validation import ValidationCallback
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from primus_bridge.report.notes import read_events
from tests.full_disk import files_up_to


def new_state(save=None, step: int = 0, train_iters: int = 40, tensorboard: bool = False) -> RunState:
    arguments = BridgeArguments()
    arguments.checkpoint.save = None if save is None else str(save)
    arguments.logger.tensorboard = tensorboard
    return RunState(arguments, step, train_iters)


def step_metrics(step: int, loss: float | None = None) -> dict:
    return {
        "step": step,
        "loss": 0.1 + 3 * math.exp(-step / 10) if loss is None else loss,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "supervised_tokens": 40,
        "tokens": 200,
        "tokens_per_second": 1234.5,
        "step_time": 0.16,
        "memory": 10**8,
    }


def drive(callbacks: Callback, state: RunState, until: int, eval_interval: int = 10) -> None:
    """The loop's calls from state.step to ``until``; the run ends there only when that is train_iters."""
    callbacks.on_train_start(state)
    while state.step < until:
        callbacks.on_step_start(state)
        state.step += 1
        callbacks.on_step_end(state, step_metrics(state.step))
        if state.step % eval_interval == 0:
            evaluation = {"step": state.step, "eval_loss": 0.2, "eval_supervised_tokens": 4000}
            callbacks.on_eval_end(state, evaluation)
    if until == state.train_iters:
        callbacks.on_train_end(state)


def test_hooks_are_called_in_order():
    calls = []

    class Named(Callback):
        def __init__(self, name):
            self.name = name

        def on_step_end(self, state, metrics):
            calls.append((self.name, metrics["step"]))

    both = CallbackList([Named("first"), Named("second")])
    drive(both, new_state(train_iters=2), 2)
    both.on_save(new_state(), "iter_0000002")
    assert calls == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]


def test_an_error_within_on_error_does_not_hide_the_first(capsys):
    seen = []

    class Broken(Callback):
        def on_error(self, state, error):
            raise RuntimeError("second")

    class Last(Callback):
        def on_error(self, state, error):
            seen.append(error)

    first = ValueError("first")
    CallbackList([Broken(), Last()]).on_error(new_state(), first)
    assert seen == [first]
    assert "second" in capsys.readouterr().err


def test_request_stop_keeps_the_first_reason():
    state = new_state()
    state.request_stop("loss is NaN")
    state.request_stop("another")
    assert state.stop_requested and state.stop_reason == "loss is NaN"


def test_metrics_lines_are_whole_after_each_step(tmp_path):
    state = new_state(tmp_path)
    callback = MetricsCallback()
    callback.on_train_start(state)
    callback.on_step_end(state, step_metrics(1))
    callback.on_step_end(state, {})  # not a log step
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(step_metrics(1)) + "\n"
    callback.on_error(state, RuntimeError())


def test_resume_continues_one_history(tmp_path):
    drive(MetricsCallback(), new_state(tmp_path), 25)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "lo')  # the kill
    drive(MetricsCallback(), new_state(tmp_path, step=20), 40)
    history = read_history(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 41))
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [10, 20, 30, 40]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_rollback_takes_back_what_came_after_the_checkpoint(tmp_path, capsys):
    state, patience = new_state(tmp_path), ValidationCallback(eval_steps=1, patience=2)
    callbacks = CallbackList([MetricsCallback(), ProgressCallback(), patience])
    callbacks.on_train_start(state)
    for step, loss in enumerate((3.0, 2.0, math.nan, -math.inf), start=1):
        state.step = step
        callbacks.on_step_end(state, step_metrics(step))
        callbacks.on_eval_end(state, {"step": step, "eval_loss": loss, "eval_supervised_tokens": 9})
        if step == 3:
            assert (patience.best.loss, patience.best.step, patience.best.waited) == (2.0, 2, 1)
            state.step = 1
            callbacks.on_rollback(state, "step 4: loss nan, gradient norm nan")
            assert (patience.best.loss, patience.best.step, patience.best.waited) == (3.0, 1, 0)
            assert [entry["step"] for entry in read_history(tmp_path / "metrics.jsonl")] == [1, 1]
    assert patience.best.loss == 3.0 and not state.stop_requested
    said = "evaluation loss nan over 9 tokens: no finite number, which never counts as the best"
    assert f"step 3: {said}" in capsys.readouterr().out
    callbacks.on_train_end(state)


def test_a_new_run_starts_a_new_history(tmp_path):
    drive(MetricsCallback(), new_state(tmp_path), 5)
    drive(MetricsCallback(), new_state(tmp_path), 3)
    assert [entry["step"] for entry in read_history(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_full_disk_costs_no_line(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state, callback = new_state(tmp_path, tensorboard=True), MetricsCallback()
    callback.on_train_start(state)
    path = tmp_path / "metrics.jsonl"

    def steps() -> list[int]:
        return [entry["step"] for entry in read_history(path)]

    def train(until: int) -> None:
        while state.step < until:
            state.step += 1
            callback.on_step_end(state, step_metrics(state.step))

    train(3)
    with files_up_to(path.stat().st_size + 20):
        train(6)
        state.step = 4
        callback.on_rollback(state, "step 7: loss nan, gradient norm nan")
        assert steps() == [1, 2, 3]
        state.step = 2
        callback.on_rollback(state, "step 5: loss nan, gradient norm nan")
        assert steps() == [1, 2]
        train(9)
        with pytest.raises(ConfigError, match="cannot write the run's files: File too large"):
            callback.on_train_end(state)
        assert path.read_bytes().endswith(b"}\n")
    callback.on_step_end(state, {})  # not a log step
    assert steps() == list(range(1, 10))
    callback.on_train_end(state)
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl is written again") >= 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))


def test_not_a_number_is_null(tmp_path):
    state = new_state(tmp_path)
    callback = MetricsCallback()
    callback.on_train_start(state)
    callback.on_step_end(state, step_metrics(1, loss=math.nan))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and json.loads(line)["loss"] is None
    assert curve.series(read_history(tmp_path / "metrics.jsonl"), "loss") == ([], [])
    callback.on_train_end(state)


def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drive(MetricsCallback(), new_state(tmp_path, tensorboard=True, train_iters=10), 10)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    assert events.Scalars("eval/loss")[0].value == pytest.approx(0.2)


def test_losses_that_are_no_numbers_are_said():
    callback, state = ValidationCallback(eval_steps=1, patience=2), new_state()
    callback.on_train_start(state)
    for step in (1, 2):
        callback.on_eval_end(state, {"step": step, "eval_loss": math.nan})
    assert state.stop_reason == "2 evaluations brought no loss that is a number"


def test_plain_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    drive(ProgressCallback(), new_state(tmp_path, step=20), 40)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "resuming at step 20 of 40"
    lines = [line for line in out if line.startswith("step ") and "/40" in line]
    assert len(lines) == 20 and len({len(line) for line in lines}) == 1
    assert lines[0].startswith("step 21/40  loss") and "1,234 tok/s" in lines[0]
    assert "step 30: evaluation loss 0.2000 over 4,000 tokens" in out


def test_a_save_is_told_of_at_its_own_step(tmp_path, capsys):
    """One in the background is done when the run has gone on from it."""
    state = new_state(tmp_path, step=3)
    CallbackList([ReportCallback(), ProgressCallback()]).on_save(state, tmp_path / "iter_0000002")
    assert [(entry["event"], entry["step"]) for entry in read_events(tmp_path)] == [("save", 2)]
    assert f"step 2: saved {tmp_path / 'iter_0000002'}" in capsys.readouterr().out


def test_the_time_left_is_that_of_steps(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    callback, state = ProgressCallback(), new_state(train_iters=1000)
    callback.on_train_start(state)
    began = time.monotonic()
    for state.step, step_time, clock in ((1, 3.0, began + 3), (2, 1.0, began + 4), (100, 1.0, began + 3702)):
        # after step 2 an evaluation took an hour
        monkeypatch.setattr(progress.time, "monotonic", lambda clock=clock: clock)
        callback.on_step_end(state, {**step_metrics(state.step), "step_time": step_time})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("ETA")[1].strip() for line in lines] == ["49:57", "33:16", "15:18"]
    state.step = 103
    callback.on_step_end(state, {})  # no log step; then the run is stopped
    state.unlogged = step_metrics(103, 1.25)
    callback.on_train_end(state)
    last = capsys.readouterr().out
    assert last.startswith("step  103/1000  loss   1.2500") and "ETA" not in last


def test_plain_lines_are_about_one_a_second(capsys):
    drive(ProgressCallback(), new_state(), 40)
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "tok/s" in line]
    assert steps[0] == "1/40" and steps[-1] == "40/40" and len(steps) < 5


def test_the_last_step_of_a_stopped_run_is_shown(capsys):
    callback, state = ProgressCallback(), new_state()
    drive(callback, state, 7)
    callback.on_train_end(state)
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "tok/s" in line]
    assert steps == ["1/40", "7/40"]
    state.step = 8
    callback.on_train_start(state)
    callback.on_step_end(state, step_metrics(8))
    state.step = 9  # of which no numbers came
    callback.on_train_end(state)
    assert "step  8/40" in capsys.readouterr().out


def test_the_end_shows_the_whole_curve(tmp_path, capsys):
    drive(CallbackList([MetricsCallback(), ProgressCallback()]), new_state(tmp_path), 20)
    drive(CallbackList([MetricsCallback(), ProgressCallback()]), new_state(tmp_path, step=20), 40)
    out = capsys.readouterr().out
    axis = out.splitlines()[-3]
    assert axis.split() == ["1", "step", "40"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_without_matplotlib_the_run_still_ends(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curve, "write_png", lambda *_, **__: (_ for _ in ()).throw(ImportError("matplotlib")))
    drive(CallbackList([MetricsCallback(), ProgressCallback()]), new_state(tmp_path), 40)
    assert "pip install matplotlib" in capsys.readouterr().out


def test_terminal_curve_falls_from_left_to_right():
    text = curve.terminal_curve([step_metrics(step) for step in range(1, 101)], width=60, height=8)
    rows = text.splitlines()[1:-2]
    assert len(rows) == 8 and max(map(len, text.splitlines())) <= 60
    first = [next(i for i, char in enumerate(row.split("┤")[1]) if char != " ") for row in rows]
    assert first == sorted(first) and first[0] == 0


@pytest.mark.parametrize("losses", ([], [1.0]))
def test_too_few_points_draw_nothing(losses):
    assert curve.terminal_curve([step_metrics(i + 1, loss) for i, loss in enumerate(losses)]) == ""


def test_a_constant_loss_draws_a_line():
    text = curve.terminal_curve([step_metrics(step, 1.0) for step in range(1, 9)], ascii_only=True)
    assert text.isascii() and "****" in text


def test_smoothing_does_not_lag():
    falling = [100.0 - step for step in range(100)]
    smoothed = curve.smooth(falling, span=5)
    assert smoothed[50] == pytest.approx(falling[50], abs=1e-3)
