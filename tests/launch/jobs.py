"""What the ranks of tests/launch run: real gloo ranks that meet, fail, or wait."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.errors import ConfigError
from primus_bridge.launch.local import LAUNCHER_PID
from primus_bridge.launch.signals import asked_to_end

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")


def meet(kind: str, folder: str) -> None:
    """Join the group, add up the ranks, then do what ``kind`` says in rank 1."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    variables = " ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES)
    (Path(folder) / f"rank{rank}").write_text(f"{os.getpid()} {total.item():.0f} {variables}")
    if kind == "both_refuse":
        raise ConfigError("the data set is empty", where="rows.json")
    if rank == 1 and kind == "refuse":
        raise ConfigError("the data set is empty", where="rows.json")
    if rank == 1 and kind in ("crash", "crash_alone"):
        raise RuntimeError("a bug in rank 1")
    if rank == 1 and kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind in ("wait", "crash_alone"):
        time.sleep(300)
    if kind == "deaf":
        with asked_to_end():
            (Path(folder) / f"deaf{rank}").touch()
            time.sleep(300)
    if kind != "fine":
        dist.barrier()
    dist.destroy_process_group()


def environment(folder: str) -> None:
    """Record the variables of a rank, without a group."""
    (Path(folder) / "single").write_text(f"{os.getpid()} " + " ".join(f"{n}={os.environ.get(n)}" for n in VARIABLES))


def refuse(folder: str) -> None:
    raise ConfigError("the data set is empty", where="rows.json")


class SignalToItself(Callback):
    """SIGUSR1 to rank 0 after step 2."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


class WaitForSignal(Callback):
    """Step 3 lasts until a signal has come to rank 0; SAVE/waiting says that it may come now."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step != 3:
            return
        assert state.save_folder is not None
        (state.save_folder / "waiting").touch()
        deadline = time.monotonic() + 120
        with asked_to_end() as asked:
            while asked() is None:
                assert time.monotonic() < deadline, "no signal has come"
                time.sleep(0.05)


class SignalToLauncher(Callback):
    """SIGTERM to the launcher after step 2, which every rank then gets."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step == 2:
            os.kill(int(os.environ[LAUNCHER_PID]), signal.SIGTERM)


class SignalToSubmit(WaitForSignal):
    """SIGUSR1 to the command that started this one, after step 2; it passes it on by the end of step 3."""

    def on_step_end(self, state: RunState, metrics: dict) -> None:
        if state.step == 2:
            os.kill(os.getppid(), signal.SIGUSR1)
        super().on_step_end(state, metrics)


def signal_while_data_is_read(row: dict) -> list[dict]:
    """A format function; the row that says 3 sends SIGTERM to this rank."""
    if row["instruction"] == "say 3":
        os.kill(os.getpid(), signal.SIGTERM)
    return [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]


if __name__ == "__main__":
    import sys

    from primus_bridge.cli.main import guarded
    from primus_bridge.launch.local import launch

    entry, kind, folder, nproc = sys.argv[1:]
    payload = {"folder": folder} if entry != "meet" else {"kind": kind, "folder": folder}
    sys.exit(guarded(lambda: launch(f"tests.launch.jobs:{entry}", payload, int(nproc))))
