"""The ``primus`` command: finds the subcommand, imports only that one, prints a user's error as one message."""

from __future__ import annotations

import importlib
import sys
from typing import Optional

from primus_bridge import __version__
from primus_bridge.errors import ConfigError, did_you_mean
from primus_bridge.launch.environment import quiet_torch

COMMANDS = {
    "train": "fine-tune or pretrain from one YAML, on one rank or many",
    "plan": "what a run would do: layout, stages, memory of a rank, steps, every argument and its source",
    "preview": "what the data becomes: tokens, loss mask, turns, packs; on the terminal, as JSON, as an HTML page",
    "convert": "checkpoints: Hugging Face to Megatron, and back",
    "verify": "transformers against Megatron: every layer, logits, loss, gradients; what diverges first",
    "checkpoint": "checkpoints of a run: list, verify, compare, thin out",
    "submit": "a run, or a grid of runs, as jobs on Slurm or one after the other here, through NeMo-Run",
    "report": "the page of a run: curves, arguments with their sources, token ledger, speed, environment",
    "quickstart": "the whole road on a built-in tiny model and data, on a CPU, in minutes",
    "doctor": "versions, devices, optional parts found or missing, active patches",
}

HELP = """\
primus: fine-tune Hugging Face models on Megatron-Core, at any layout, on CPU or GPU

usage: primus COMMAND [options]
       primus COMMAND --help
       primus --version

commands:
{commands}

examples:
  primus quickstart
  primus train --framework megatron_bridge --config run.yaml --dry_run
  primus train --framework megatron_bridge --config run.yaml --save out --lr 5e-6 --tensor_model_parallel_size 2
  primus convert --load out --convert_to_hf --hf_save_path out/hf
"""

OF_PRIMUS = """
of the Primus in {folder}: {commands};
and 'primus train SUITE --config FILE' of a module of another framework
"""

USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Optional[list[str]] = None) -> int:
    """Run one command; the exit code: 0, 1 for a failure, 2 for what the user can mend, 130 for Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)
    quiet_torch()
    return guarded(lambda: _dispatch(words))


def guarded(run) -> int:
    """``run()``, its ConfigError printed as ``primus: message`` on stderr without a traceback."""
    try:
        return run() or 0
    except ConfigError as error:
        print(f"primus: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("primus: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # primus ... | head
        sys.stderr.close()
        return 0


def _dispatch(words: list[str]) -> int:
    from primus_bridge.integrations import primus as host

    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS)) + 2
        print(HELP.format(commands="\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())), end="")
        if others := [name for name in host.host_commands() if name not in COMMANDS]:
            print(OF_PRIMUS.format(folder=host.host_folder(), commands=", ".join(others)), end="")
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"primus-bridge {__version__}")
        return 0
    if host.takes(words):
        return host.main(words)
    if words[0] not in COMMANDS:
        known = list(dict.fromkeys([*COMMANDS, *host.host_commands()]))
        raise ConfigError(
            f"unknown command '{words[0]}'{did_you_mean(words[0], known)}; the commands are {', '.join(known)}"
        )
    module = importlib.import_module(f"primus_bridge.cli.{words[0]}")
    return module.main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
