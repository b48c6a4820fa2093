"""A local rank: ``python -m primus_bridge.launch.rank PAYLOAD.json`` calls its entry; its errors go to the launcher."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from primus_bridge.errors import ConfigError
from primus_bridge.launch.local import ERROR_DIR, EXIT_INTERRUPTED, EXIT_USER_ERROR, LAUNCHER_PID, call


def main(file: str) -> int:
    """Run the payload; the exit code."""
    _die_with_launcher()
    with open(file, encoding="utf-8") as stream:
        job = json.load(stream)
    try:
        call(job["entry"], job["payload"])
    except ConfigError as error:
        _leave("error", str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseException:  # torch.distributed.checkpoint's exception is no Exception
        _leave("traceback", traceback.format_exc())
        return 1
    return 0


def _leave(kind: str, text: str) -> None:
    folder, rank = os.environ.get(ERROR_DIR), os.environ.get("RANK", "0")
    if folder is None:
        print(text, file=sys.stderr)
        return
    path = Path(folder) / f"{kind}_rank{rank}.txt"
    # the launcher may read while another rank still writes
    temporary = path.with_suffix(".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def _die_with_launcher() -> None:
    """Linux: a killed launcher takes its ranks with it, so that none is left holding a port or a device."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ.get(LAUNCHER_PID, os.getppid())):  # it died before the call
            os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # a failed rank does not wait for threads of collectives that will never end
    os._exit(code) if code else sys.exit(0)
