"""Local ranks: one in this process, or several through torch's elastic launcher, with one clear error at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, Union

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.validate import check_world, layout_size
from primus_bridge.errors import ConfigError
from primus_bridge.launch.passing_on import passed_on, passing_on

ERROR_DIR = "PRIMUS_BRIDGE_ERROR_DIR"
"""Where a rank leaves the message of its ConfigError or its traceback for the launcher to show once."""

LAUNCHER_PID = "PRIMUS_BRIDGE_LAUNCHER_PID"
"""The process whose end is the end of every rank."""

SHUTDOWN_SECONDS = 5
"""How long a rank may take to end after SIGTERM, before the launcher sends SIGKILL."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def ranks_for(arguments: BridgeArguments) -> int:
    """How many local ranks to start: --nproc, else what the layout needs on CPU, else every GPU.

    Raises ConfigError when the layout or the batch does not divide over them.
    """
    nproc = arguments.dist.nproc
    if nproc is None:
        nproc = layout_size(arguments)
        if arguments.dist.device != "cpu":
            nproc = _gpus() or nproc
    check_world(arguments, nproc)
    return nproc


def launch(entry: str, payload: dict[str, Any], nproc: int) -> int:
    """Run ``entry`` ('module:function') with ``payload`` (JSON) as keywords in every one of nproc ranks; the exit code.

    Each rank has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. One rank runs in this very process and
    its exceptions are the caller's. With several, the first failure ends all: a ConfigError of a rank is raised here
    (ranks that say the same say it once); another failure is printed once, and the exit code is 1; Ctrl-C gives 130.
    """
    if nproc == 1:
        with _single_rank_environment():
            call(entry, payload)
        return 0
    with _job_folder() as folder:
        file = folder / "payload.json"
        file.write_text(json.dumps({"entry": entry, "payload": payload}), encoding="utf-8")
        code, _ = _elastic(sys.executable, ("-m", "primus_bridge.launch.rank", str(file)), folder, nproc)
        return code


def launch_function(function: Callable[..., Any], args: tuple, nproc: int) -> Any:
    """Run ``function(*args)`` in every one of nproc local ranks; what it returned on rank 0.

    As ``launch``, but several ranks are spawned from this process: they import its script (which must be guarded by
    ``if __name__ == "__main__"``) and get function and arguments pickled. A failure that is no ConfigError is printed
    and raises RuntimeError.
    """
    if nproc == 1:
        with _single_rank_environment():
            quiet_upstream()
            return function(*args)
    from primus_bridge.launch.rank import in_rank

    with _job_folder() as folder:
        code, results = _elastic(in_rank, (function, *args), folder, nproc)
    if code:
        raise RuntimeError(f"the run of {nproc} ranks failed with exit code {code}; what failed is printed above")
    return results[0]


@contextlib.contextmanager
def _job_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="primus_bridge_") as folder:
        (Path(folder) / "errors").mkdir()
        yield Path(folder)


def call(entry: str, payload: dict[str, Any]) -> Any:
    """Import 'module:function' and call it with the payload's keywords."""
    quiet_upstream()
    module, _, function = entry.partition(":")
    return getattr(importlib.import_module(module), function)(**payload)


def quiet_upstream() -> None:
    """Leave out what upstream packages say to their own developers; primus doctor says what of it matters."""
    # megatron.core says at import, five times, that it falls back
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex).*not installed", category=UserWarning)
    # torch of the ShardedTensor that megatron.core saves with
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    # the last: a CUDA build of torch where no GPU is, or none is wanted, says so at the import of its C++ tools
    for name in ("megatron.core", "torch.distributed.checkpoint", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # logs what it then raises
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextlib.contextmanager
def _single_rank_environment() -> Iterator[None]:
    """The variables of a world of one; afterwards the former environment, and no process group."""
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any free one
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # torchrun's is that of another job
    }
    before = {name: os.environ.get(name) for name in rank}
    os.environ.update(rank)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        # after an error the groups of this world of one are still there, in the way of the caller's next one
        parallel = sys.modules.get("primus_bridge.megatron.parallel")
        if parallel is not None:
            parallel.leave()


@contextlib.contextmanager
def _launch_environment(errors: Path, nproc: int) -> Iterator[None]:
    """What the ranks inherit: the error folder, a share of the cores, the loopback interface for gloo."""
    defaults = {ERROR_DIR: str(errors), LAUNCHER_PID: str(os.getpid())}
    if "OMP_NUM_THREADS" not in os.environ:
        defaults["OMP_NUM_THREADS"] = str(max(1, _cores() // nproc))
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        # all ranks are on this machine, whose own name may not resolve
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(defaults)
    try:
        yield
    finally:
        for name in defaults:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """torch's launcher catches the signals that should end its ranks, and goes on catching them when they are gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _short_end() -> Iterator[None]:
    """After a rank has failed, torch gives the others 30 seconds, in which one that waits for it to join only waits."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    before = PContext.close

    def close(ranks: PContext, death_sig: Union[signal.Signals, None] = None, timeout: int = 30) -> None:
        before(ranks, death_sig, min(timeout, SHUTDOWN_SECONDS))

    PContext.close = close  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PContext.close = before  # type: ignore[method-assign]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _elastic(
    entrypoint: Union[str, Callable[..., Any]], args: tuple, folder: Path, nproc: int
) -> tuple[int, dict[int, Any]]:
    """(exit code, what a function returned by rank)"""
    errors = folder / "errors"
    # the launcher's own log lines repeat at length what the ranks say; ours come from `errors`
    logging.disable(logging.CRITICAL)
    try:
        from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        wanted: dict[str, Any] = {
            "min_nodes": 1,
            "max_nodes": 1,
            "nproc_per_node": nproc,
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "max_restarts": 0,
            "monitor_interval": 0.1,
            "local_addr": "127.0.0.1",
            "logs_specs": DefaultLogsSpecs(log_dir=str(folder / "logs")),
            # newer torch; older ones catch SIGTERM too, and give the ranks those 30 seconds to save
            "signals_to_handle": "SIGINT,SIGHUP,SIGQUIT",
        }
        known = {field.name for field in dataclasses.fields(LaunchConfig)}
        config = LaunchConfig(**{name: value for name, value in wanted.items() if name in known})
        with _launch_environment(errors, nproc), _own_signals(), _short_end(), passing_on(errors, SignalException):
            return 0, elastic_launch(config, entrypoint)(*args)
    except ChildFailedError as error:
        codes = _own_endings(error.failures)
        number = passed_on(errors)
        if number is not None and {-code for code in codes.values()} <= {number, signal.SIGTERM, signal.SIGKILL}:
            return 128 + number, {}  # they had nothing to save yet
        return _report(errors, codes), {}
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + int(error.sigval), {}
    finally:
        logging.disable(logging.NOTSET)


def _own_endings(failures: dict[int, Any]) -> dict[int, int]:
    """The exit codes of the ranks that ended by themselves, not of those that the launcher then ended.

    It sends SIGTERM to the others at the first failure, and SIGKILL after SHUTDOWN_SECONDS.
    """
    first = min(failure.timestamp for failure in failures.values())
    own = {
        rank: failure.exitcode
        for rank, failure in failures.items()
        if failure.exitcode != -signal.SIGTERM and failure.timestamp < first + SHUTDOWN_SECONDS
    }
    return own or {rank: failure.exitcode for rank, failure in failures.items()}


def _report(errors: Path, exit_codes: dict[int, int]) -> int:
    """Raise the ranks' ConfigError, or print which rank hangs, or the traceback of the rank that failed first."""
    messages = [path.read_text(encoding="utf-8") for path in sorted(errors.glob("error_rank*.txt"))]
    if messages:
        raise ConfigError("\nprimus: ".join(dict.fromkeys(messages))) from None
    hanging = sorted(errors.glob("hanging_rank*.txt"))
    if hanging:  # each says the same; the other ranks were ended for it
        print(hanging[0].read_text(encoding="utf-8"), file=sys.stderr)
        return 1
    if EXIT_INTERRUPTED in exit_codes.values():
        raise KeyboardInterrupt
    killed = {rank: code for rank, code in exit_codes.items() if code < 0}
    if killed:  # the other ranks then fail too, on the connection, which says nothing
        for rank, code in killed.items():
            print(f"primus: rank {rank} {_ending(code)}", file=sys.stderr)
        return 1
    tracebacks = sorted(errors.glob("traceback_rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if tracebacks:
        first = tracebacks[0].stem.removeprefix("traceback_rank")
        print(f"{tracebacks[0].read_text(encoding='utf-8')}primus: rank {first} failed", file=sys.stderr)
        return 1
    rank, code = min(exit_codes.items())
    print(f"primus: rank {rank} {_ending(code)}", file=sys.stderr)
    return 1


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
