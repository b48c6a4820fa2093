"""The lock of a save folder: between processes and within one, over two ranks, after SIGKILL, without file locks."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import re
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from primus_bridge.checkpoint.lock import LOCK_FILE, Holder, RunLock
from primus_bridge.cli.main import main
from primus_bridge.errors import ConfigError
from tests.cli import example
from tests.distributed.harness import run_distributed, start_ranks


def hold(save: str) -> None:
    """Until it is killed; SAVE/held.RANK says that it does."""
    import torch.distributed as dist

    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    RunLock.acquire(Path(save))
    Path(save, f"held.{os.environ['RANK']}").touch()
    time.sleep(120)


def started(world_size: int, save: Path) -> list:
    """The processes of a run that holds ``save``."""
    job = start_ranks(hold, world_size, str(save))
    deadline = time.monotonic() + 60
    while len(list(save.glob("held.*"))) < world_size:
        assert time.monotonic() < deadline and all(rank.exitcode is None for rank in job.ranks)
        time.sleep(0.05)
    return job.ranks


def end(process) -> None:
    process.kill()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path, capfd):
    with example.workplace(tmp_path):
        example.write_rows(tmp_path / "rows.json", example.alpaca_rows(8))
        (holder,) = started(1, tmp_path / "run")
        capfd.readouterr()
        before = example.tree(tmp_path / "run")
        words = example.train_words("model", "rows.json", "run", train_iters=1, report=False)
        assert main(words) == 2
        err = capfd.readouterr().err
        who = rf"\(pid {holder.pid} on {re.escape(socket.gethostname())}, since [-0-9]+ [:0-9]+\)"
        mend = "wait for its end, or give another --save"
        assert re.fullmatch(rf"primus: run: another run is using this folder {who}: {mend}\n", err), err
        convert = ["convert", "--convert_from_hf", "--hf_model_name_or_path", "model", "--save", "run"]
        assert main(convert) == 2
        assert "primus: run: another run is using this folder" in capfd.readouterr().err
        assert example.tree(tmp_path / "run") == before
        end(holder)
        assert (tmp_path / "run" / LOCK_FILE).exists()  # nobody has to remove it
        assert main(words) == 0
        assert not (tmp_path / "run" / LOCK_FILE).exists()
        # a run that is refused for another reason leaves nothing of the lock either
        example.write_rows(tmp_path / "odd.json", [{"instruction": "one", "output": 5}])
        assert main(example.train_words("model", "odd.json", "made/here")) == 2
        assert not (tmp_path / "made").exists()


def test_the_other_ranks_of_a_killed_run_hold_it_on(tmp_path, capfd):
    first, second = started(2, tmp_path)
    end(first)
    threading.Timer(1.0, second.kill).start()
    began = time.monotonic()
    with RunLock.acquire(tmp_path):
        assert 0.9 < time.monotonic() - began < 10
    told = rf"waiting   for the last processes of a run \(pid {first.pid} on .*\) to leave {re.escape(str(tmp_path))}\n"
    assert re.fullmatch(told, capfd.readouterr().out)


def acquired(save: str) -> str:
    """What acquiring says in this rank; rank 0 of those that got it is left alone with it for a moment."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        lock = RunLock.acquire(Path(save))
    except ConfigError as error:
        return str(error)
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.5)  # rank 0, the first to release, still removes the file
    lock.release()
    dist.barrier()
    return "free" if not Path(save, LOCK_FILE).exists() else "left"


def test_all_ranks_are_refused_and_all_release(tmp_path):
    with RunLock.acquire(tmp_path):
        refusals = run_distributed(acquired, 2, str(tmp_path))
    assert refusals[0] == refusals[1] and f"using this folder (pid {os.getpid()} on " in refusals[0]
    assert run_distributed(acquired, 2, str(tmp_path)) == ["free", "free"]


def test_two_runs_of_one_process(tmp_path):
    save = tmp_path / "a" / "b"
    lock = RunLock.acquire(save)
    with pytest.raises(ConfigError, match=f"another run is using this folder \\(pid {os.getpid()} on "):
        RunLock.acquire(save)
    # a worker that was forked meanwhile does not keep what is given back
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    with RunLock.acquire(save):
        (save / "run.yaml").touch()
    assert [path.name for path in save.iterdir()] == ["run.yaml"]
    end(worker)


def test_a_job_that_slurm_requeued_waits_for_its_former_self(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    lock = RunLock.acquire(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "node2")
    with pytest.raises(ConfigError, match=r"another run .* on node1, Slurm job 77, since "):
        RunLock.acquire(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(0.5, lock.release).start()
    RunLock.acquire(tmp_path).release()
    assert "waiting   for the last processes" in capfd.readouterr().out


def test_what_a_run_removes_at_its_end_is_not_refused_for(tmp_path, monkeypatch):
    old = RunLock.acquire(tmp_path)
    open_file, removed = os.open, []

    def open_late(path, *args, **kwargs) -> int:
        """As a run does that opens the file just before the old one removes it, which holds it for a moment more."""
        descriptor = open_file(path, *args, **kwargs)
        if Path(path) == tmp_path / LOCK_FILE and not removed:
            removed.append(path)
            os.unlink(path)
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    with RunLock.acquire(tmp_path):
        assert removed
        monkeypatch.undo()
        old.release()  # and leaves what is another run's
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def turn_off_locks() -> None:
    """From now on this process's kernel answers flock as a file system without locks does."""
    flock = {"x86_64": 73, "aarch64": 32}[platform.machine()]
    # if the number of the call is flock's: errno ENOSYS; else allow it (struct sock_filter, linux/filter.h)
    program = b"".join(
        struct.pack("HBBI", *step)
        for step in [(0x20, 0, 0, 0), (0x15, 0, 1, flock), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000)]
    )
    steps = ctypes.create_string_buffer(program)
    filters = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, filters, 0, 0) == 0, os.strerror(ctypes.get_errno())


def without_locks(save: str) -> list[str]:
    turn_off_locks()
    lock = RunLock.acquire(Path(save))
    inside = [path.name for path in Path(save).iterdir()]
    lock.release()
    return inside


def beside_locks(save: str) -> tuple[str, bool, bool]:
    """Two ranks, and rank 1's machine has no locks: what a run without them says, and what is left of the file."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        turn_off_locks()
    lock = RunLock.acquire(Path(save))
    file, refusal = Path(save, LOCK_FILE), ""
    if dist.get_rank() == 1:
        alone = RunLock(Path(save))
        with pytest.raises(ConfigError) as refused:
            alone._lead()
        alone.release()
        refusal = str(refused.value)
    dist.barrier()
    held = file.exists()
    dist.barrier()
    lock.release()
    dist.barrier()
    return refusal, held, file.exists()


def test_a_run_without_locks_leaves_the_file_of_one_that_has_them(tmp_path):
    (_, *first), (refusal, *second) = run_distributed(beside_locks, 2, str(tmp_path))
    assert first == second == [True, False]
    assert re.search(
        r"another run \(pid \d+ on .*\) is using this folder.*; if it has ended, remove .*/\.lock; ", refusal
    )
    # what a run that has ended left is not in the way, and nobody's to remove
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    with open(tmp_path / LOCK_FILE, "wb") as file:
        Holder(ended.pid, socket.gethostname(), None, None, "").write(file.fileno())
    assert run_distributed(without_locks, 1, str(tmp_path)) == [[LOCK_FILE]]
    assert (tmp_path / LOCK_FILE).exists()


def test_a_file_system_without_locks_or_that_cannot_be_written(tmp_path):
    assert run_distributed(without_locks, 1, str(tmp_path / "save")) == [[]]
    assert not (tmp_path / "save").exists()
    with pytest.raises(ConfigError, match="/proc/none: cannot write the lock of the save folder: "):
        RunLock.acquire(Path("/proc/none"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the save folder cannot be a folder: .* is a file"):
        RunLock.acquire(tmp_path / "file")
