"""Ranks that hang are named, with the step and the place; a rank that works is left alone however long it takes."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.checkpoint.writer import Writer, Written
from primus_bridge.cli.main import main
from primus_bridge.launch.local import ERROR_DIR
from primus_bridge.launch.passing_on import pid_of
from primus_bridge.watchdog import Word, stands, verdict
from tests.cli import example
from tests.cli.command import ROOT
from tests.distributed.harness import run_distributed

MEND = "Raise dist.distributed_timeout_minutes if that may take longer"
WAITS = ["torch.distributed", "megatron.core"]


class Stops(Callback):
    """Stops the process of rank 1 in step 2, and notes which it is."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step == 2:
            pid = pid_of(Path(os.environ[ERROR_DIR]), 1)
            os.kill(pid, signal.SIGSTOP)
            Path("stopped").write_text(str(pid))


class Sleeps(Callback):
    """Rank 0 does not come back from step 2."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step == 2:
            time.sleep(120)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with example.workplace(tmp_path_factory.mktemp("hanging")) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        example.write_rows(folder / "rows.json", example.alpaca_rows(16))
        yield folder


def words(save: str, callback: type) -> list[str]:
    options = {"tensor_model_parallel_size": 2, "train_iters": 9, "dist.distributed_timeout_minutes": 0.15}
    callbacks = f"[{{path: tests.distributed.test_hanging.{callback.__name__}}}]"
    return example.train_words("model", "rows.json", save, report=False, callbacks=callbacks, **options)


def test_a_stopped_rank_ends_the_command(place, capfd):
    assert main(words("stop", Stops)) == 1
    pid = (place / "stopped").read_text()
    assert capfd.readouterr().err.splitlines()[-1] == (
        "primus: rank 1 hangs: nothing is heard of it (its process is stopped or gone, or the machine is); "
        f"rank 0 waits in step 2, forward pass 4 (all_reduce). {MEND}"
    )
    assert not Path("/proc", pid).exists()


def told(folder: Path, monkeypatch, function, *args) -> str:
    """What is said of a job of two ranks that hang."""
    monkeypatch.setenv(ERROR_DIR, str(folder))
    with pytest.raises(AssertionError, match="rank . of 2 ended with exit code 1, without a result"):
        run_distributed(function, 2, *args)
    (file,) = folder.glob("hanging_rank*.txt")
    return file.read_text()


def test_a_callback_that_does_not_come_back_is_shown(place, tmp_path, monkeypatch):
    pattern = (
        r"primus: rank 0 hangs in step 2, forward pass 4: it gave no sign for \d+ s "
        rf"\(at {re.escape(__file__)}:\d+ in on_step_end\); rank 1 waits in step 2, forward pass 4 \(all_reduce\)\. "
    )
    assert re.fullmatch(pattern + MEND, told(tmp_path, monkeypatch, main, words("sleep", Sleeps)))


def joined() -> int:
    """This process in a job of gloo ranks; its rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return dist.get_rank()


def lives_long() -> tuple[bool, int]:
    """Rank 0 works and beats for longer than rank 1 would wait for a hanging one; how many threads are left."""
    import torch.distributed as dist

    from primus_bridge.watchdog import beat, watching

    rank, threads = joined(), threading.active_count()
    for parts in (8, 0):
        with watching(3.0, WAITS, []):
            assert threading.active_count() == threads + 2
            for part in range(parts if rank == 0 else 0):
                beat(f"part {part}")
                time.sleep(0.5)
            dist.barrier()
            if parts and rank == 1:
                time.sleep(1.0)  # its last beat is long ago, but it has waited since, through no fault of its own
            dist.barrier()
    return rank == 0, threading.active_count() - threads


def test_a_long_step_that_lives_is_left_alone():
    assert run_distributed(lives_long, 2) == [(True, 0), (False, 0)]


def waits_for_threads(folder: str) -> bool:
    """Rank 0 waits for its asynchronous write, rank 1 reads a checkpoint; both take longer than a hanging rank may."""
    import torch.distributed as dist

    from primus_bridge.checkpoint.integrity import damage
    from primus_bridge.checkpoint.manifest import Checkpoint, Manifest
    from primus_bridge.watchdog import beat, watching

    def work(stopped) -> Written:
        for _ in range(8):
            stopped()
            time.sleep(0.5)
        return Written()

    rank = joined()
    with watching(2.0, WAITS, []):
        beat("the commit")
        if rank == 0:
            assert Writer(work, background=True).result().error is None
        else:
            Path(folder, "state").write_bytes(bytes(8 * 2**20))
            files = {"files": {"state": 8 * 2**20}, "checksums": {"state": ""}}
            checkpoint = Checkpoint(Path(folder), Manifest(1, "model", True, "float32", "llama", **files))
            findings = damage(checkpoint, progress=lambda count: time.sleep(0.5))  # after each MiB, as on a slow disk
            assert findings == ["state differs from its checksum"]
        dist.barrier()
    return True


def test_a_rank_that_waits_for_its_own_threads_is_left_alone(tmp_path):
    assert run_distributed(waits_for_threads, 2, str(tmp_path)) == [True, True]


def hang_in_the_writer() -> None:
    """Rank 0's asynchronous write does not go on."""
    import torch.distributed as dist

    from primus_bridge.watchdog import beat, watching

    rank = joined()
    with watching(1.0, WAITS, []):
        beat("the commit")
        if rank == 0:
            Writer(lambda stopped: time.sleep(120) or Written(), background=True).result()
        dist.barrier()


def test_a_writer_that_hangs_is_shown(tmp_path, monkeypatch):
    assert re.fullmatch(
        r"primus: rank 0 hangs in the commit: it gave no sign for \d+ s \(at \S+/writer\.py:\d+ in _has_ended\); "
        rf"rank 1 waits in the commit \(barrier\)\. {MEND}",
        told(tmp_path, monkeypatch, hang_in_the_writer),
    )


def test_what_a_gpu_has_queued_is_waited_for_where_it_is_known_as_waiting(tmp_path, monkeypatch):
    import torch

    from primus_bridge.checkpoint import replication
    from primus_bridge.checkpoint.coordinator import CheckpointCoordinator
    from primus_bridge.megatron.parallel import OWN_WORK, waits_on
    from primus_bridge.trainers.export import export_run

    class Waited(Exception):
        pass

    def synchronize() -> None:
        raise Waited

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    coordinator = CheckpointCoordinator.__new__(CheckpointCoordinator)
    coordinator._pending = None
    with pytest.raises(Waited):
        coordinator.begin(None, None)
    with pytest.raises(Waited):
        export_run(None, tmp_path)
    # the copies are compared by what other ranks send, and .item() has no frame of its own
    names = {"sys": sys, "__name__": replication.__name__}
    frame = types.FunctionType((lambda: sys._getframe()).__code__, names)()
    assert stands(frame, waits_on("cuda"), OWN_WORK)[0] and not stands(frame, waits_on("cpu"), OWN_WORK)[0]


def wait_apart() -> None:
    """Each rank waits for the other one elsewhere."""
    import torch.distributed as dist

    from primus_bridge.watchdog import beat, watching

    rank = joined()
    groups = [dist.new_group(), dist.new_group()]
    with watching(1.0, WAITS, []):
        beat(f"step {rank + 1}")
        dist.barrier(groups[rank])


def test_ranks_that_wait_for_each_other_are_shown(tmp_path, monkeypatch):
    here = rf"at {re.escape(__file__)}:\d+ in wait_apart"
    pattern = (
        r"primus: no rank has given a sign for \d+ s, and each waits for another: "
        rf"rank 0 in barrier {here} \(step 1\); rank 1 in barrier {here} \(step 2\)\. Either they do not agree .*"
    )
    assert re.fullmatch(pattern, told(tmp_path, monkeypatch, wait_apart))


def stop_with_the_store() -> None:
    """Rank 0, whose process has the store in it as under srun, stops; rank 1 waits for it."""
    import torch.distributed as dist

    from primus_bridge.watchdog import beat, watching

    rank = int(os.environ["RANK"])
    meeting = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(meeting.get("port")), is_master=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with watching(2.0, WAITS, []):
        beat("step 7")
        dist.barrier()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


def test_the_rank_that_holds_the_store_is_named_too(tmp_path, monkeypatch):
    assert re.fullmatch(
        r"primus: rank 0 hangs or is gone: the job's store, which it holds, does not answer; rank 1 has given no sign "
        rf"for \d+ s in step 7 \(at {re.escape(__file__)}:\d+ in stop_with_the_store\)\. {MEND}",
        told(tmp_path, monkeypatch, stop_with_the_store),
    )


def test_what_ranks_say_together():
    waits = Word("step 7", 61.0, "all_reduce", "step.py:1 in train_step")
    stuck = Word("step 7, forward pass 3", 62.0, None, "rows.py:31 in __getitem__")
    works = Word("step 7, forward pass 4", 2.0, None, "rows.py:31 in __getitem__")
    everybody = {rank: waits for rank in range(9)}
    assert verdict(everybody | {4: stuck}, [], 9, 60) == (
        "rank 4 hangs in step 7, forward pass 3: it gave no sign for 62 s (at rows.py:31 in __getitem__); "
        f"ranks 0-3, 5-8 wait in step 7 (all_reduce). {MEND}"
    )
    few = {rank: waits for rank in (0, 1, 5)}
    assert verdict(few | {2: stuck}, [3, 4], 6, 60) == (
        "rank 2 hangs in step 7, forward pass 3: it gave no sign for 62 s (at rows.py:31 in __getitem__); "
        "ranks 3, 4 hang: nothing is heard of them (their processes are stopped or gone, or the machine is); "
        f"ranks 0, 1, 5 wait in step 7 (all_reduce). {MEND}"
    )
    # one works on, has only just come to where the others wait, or has gone on from there and left
    assert verdict(everybody | {4: works}, [], 9, 60) is None
    assert verdict(everybody | {4: Word("step 7", 1.0, "all_reduce", "")}, [], 9, 60) is None
    assert verdict(everybody, [], 10, 60) is None
    assert "no rank has given a sign" in (verdict(everybody, [], 9, 60) or "")
    assert "nothing is heard of it" in (verdict(everybody | {4: works}, [9], 10, 60) or "")
