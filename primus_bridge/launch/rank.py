"""A local rank: ``python -m primus_bridge.launch.rank PAYLOAD.json`` calls its entry; its errors go to the launcher."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

from primus_bridge.errors import ConfigError
from primus_bridge.launch.local import (
    ERROR_DIR,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    LAUNCHER_PID,
    call,
    quiet_upstream,
)
from primus_bridge.launch.passing_on import join_signals, pid_of


def main(file: str) -> int:
    """Run the payload; the exit code."""
    _join_launcher()
    with open(file, encoding="utf-8") as stream:
        job = json.load(stream)
    return _guarded(lambda: call(job["entry"], job["payload"]))


def in_rank(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a local rank that was spawned for it; after an error this process ends here."""
    _join_launcher()
    quiet_upstream()
    result: list[Any] = []
    code = _guarded(lambda: result.append(function(*args)))
    if code:
        leave_process(code)
    return result[0]


def refuse(message: str) -> None:
    """End a spawned rank that has not begun yet; its launcher tells why."""
    leave_word("error", message)
    leave_process(EXIT_USER_ERROR)


def leave_process(code: int) -> None:
    """A failed rank does not wait for threads of collectives that will never end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _guarded(work: Callable[[], Any]) -> int:
    """The exit code of ``work``, whose error is left for the launcher."""
    try:
        work()
    except ConfigError as error:
        leave_word("error", str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseException:  # torch.distributed.checkpoint's exception is no Exception
        leave_word("traceback", traceback.format_exc())
        return 1
    return 0


def leave_word(kind: str, text: str) -> None:
    """Leave an 'error', a 'traceback' or who is 'hanging' for the launcher to show; on stderr without one."""
    folder, rank = os.environ.get(ERROR_DIR), os.environ.get("RANK", "0")
    if folder is None:
        print(text, file=sys.stderr)
        return
    path = Path(folder) / f"{kind}_rank{rank}.txt"
    # the launcher may read while another rank still writes
    temporary = path.with_suffix(".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def kill_rank(rank: int) -> None:
    """End another rank of this one's launcher; nothing without one."""
    folder = os.environ.get(ERROR_DIR)
    if folder is not None:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(pid_of(Path(folder), rank), signal.SIGKILL)


def _join_launcher() -> None:
    """Die with the launcher (Linux), so that no rank is left holding a port or a device; get its signals."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ.get(LAUNCHER_PID, os.getppid())):  # it died before the call
            os._exit(EXIT_INTERRUPTED)
    folder = os.environ.get(ERROR_DIR)
    if folder is not None:
        join_signals(Path(folder))


if __name__ == "__main__":
    if code := main(sys.argv[1]):
        leave_process(code)
