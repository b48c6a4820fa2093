"""SIGTERM and SIGUSR1: save after the step under way and end; ends before training; a second request; the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from primus_bridge.cli.main import main
from primus_bridge.launch.signals import ONE_REQUEST_SECONDS, asked_to_end
from tests.cli import example
from tests.cli.command import ROOT


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with example.workplace(tmp_path_factory.mktemp("signals")) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        example.write_rows(folder / "rows.json", example.alpaca_rows(16))
        yield folder


def words(save: str, **options) -> list[str]:
    return example.train_words("model", "rows.json", save, train_iters=200, report=False, **options)


def test_a_rank_saves_after_its_step_and_ends(place, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert main([*words("one"), "--callbacks", "[{path: tests.launch.jobs.SignalToItself}]"]) == 0
    out, err = capfd.readouterr()
    assert "stopped   at step 2 of 200: SIGUSR1 received; the same command goes on\n" in out
    assert "primus: SIGUSR1 received: ending after the work under way; again to end at once\n" in err
    assert (place / "one/stopped").read_text() == "SIGUSR1 received at step 2 of 200\n"
    assert (place / "one/latest_checkpointed_iteration.txt").read_text() == "2"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    # the same command goes on
    assert main([*words("one"), "--train_iters", "3"]) == 0
    assert [line["step"] for line in example.loss_lines(place / "one")] == [1, 2, 3]
    assert not (place / "one/stopped").exists()


def test_without_training_state_nothing_is_promised(place, capfd):
    weights = words("weights", save_optim=False)
    assert main([*weights, "--callbacks", "[{path: tests.launch.jobs.SignalToItself}]"]) == 0
    out = capfd.readouterr().out
    assert "stopped   at step 2 of 200: SIGUSR1 received; it cannot go on: save_optim is false" in out
    assert "goes on" not in out
    left = (place / "weights/stopped").read_text()  # without the word that batch scripts requeue by
    assert left == "ended by a signal, without a training state (save_optim is false), at step 2 of 200\n"
    assert main(weights) == 2
    err = capfd.readouterr().err
    assert "its checkpoint of step 2 has no training state (save_optim was false)" in err
    assert "--load weights with another --save" in err


def test_before_training_there_is_nothing_to_save(place, capfd):
    options = ["--dataset_format", "custom", "--format_function", "tests.launch.jobs.signal_while_data_is_read"]
    assert main([*words("early"), *options]) == 0
    assert "stopped   at step 0 of 200: SIGTERM received; the same command goes on\n" in capfd.readouterr().out
    assert example.tree(place / "early").keys() == {"stopped"}


def test_a_launcher_passes_it_on_and_waits(place, capfd):
    two = words("two", tensor_model_parallel_size=2)
    assert main([*two, "--callbacks", "[{path: tests.launch.jobs.SignalToLauncher}]"]) == 0
    assert "of 200: SIGTERM received; the same command goes on\n" in capfd.readouterr().out
    step = int((place / "two/latest_checkpointed_iteration.txt").read_text())
    assert step in (2, 3)  # the launcher may pass it on when the next step has begun
    assert (place / "two/stopped").read_text() == f"SIGTERM received at step {step} of 200\n"


def test_a_second_request_ends_ranks_that_do_not(tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-m", "tests.launch.jobs", "meet", "deaf", str(tmp_path), "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("deaf*"))) < 2:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.1)
    for _ in range(2):  # a signal to the group and one to the process are one request
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    time.sleep(ONE_REQUEST_SECONDS + 0.2)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert err.count("SIGTERM received") == 1 and "Traceback" not in err
    pids = [int(path.read_text().split()[0]) for path in tmp_path.glob("rank*")]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_came_before_is_asked_again(capfd):
    """Inside another listener it is that one's; outside again the handlers are those of before."""
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with asked_to_end() as asked:
            with asked_to_end() as inner:
                assert inner() is None
                os.kill(os.getpid(), signal.SIGUSR1)
                assert inner() == asked() == "SIGUSR1 received"
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received == []  # so soon after the first it is the same request
            time.sleep(ONE_REQUEST_SECONDS + 0.1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received == [signal.SIGUSR1]
        with asked_to_end() as asked:
            assert asked() is None
    finally:
        signal.signal(signal.SIGUSR1, before)
