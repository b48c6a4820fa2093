"""``primus quickstart``: the whole road on a tiny model and data made on the spot, on a CPU, in minutes."""

from __future__ import annotations

from pathlib import Path

from primus_bridge.cli.convert import Parser
from primus_bridge.errors import ConfigError

DESCRIPTION = """\
Makes a tiny Llama and a set of questions, asks it, trains it with tensor-parallel Megatron-Core ranks on this CPU,
exports it to Hugging Face, and asks again. An earlier quickstart in the same folder is replaced.
"""
EXAMPLES = """\
examples:
  primus quickstart
  primus quickstart --save /tmp/try --seed 2
  primus quickstart --save /tmp/try --train_iters 20     a short look; the answers are not judged
"""


def parser() -> Parser:
    """The options of the command."""
    import argparse

    p = Parser(
        prog="primus quickstart",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--save", default="primus_quickstart", metavar="DIR", help="default: ./primus_quickstart")
    p.add_argument("--seed", type=int, default=1, help="of the data, the weights and the sample order; default 1")
    p.add_argument("--train_iters", type=int, metavar="N", help="steps; default: the full length")
    p.add_argument(
        "--nproc",
        type=int,
        default=2,
        choices=(1, 2, 4),
        help="ranks: 2 are tensor parallel, 4 data parallel too; default 2",
    )
    p.add_argument("--no_check", action="store_true", help="do not fail when too few answers are right")
    return p


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    options = parser().parse(argv)
    if options.train_iters is not None and options.train_iters < 1:
        raise ConfigError(f"--train_iters must be above 0, got {options.train_iters}")
    from primus_bridge.launch.environment import join_job
    from primus_bridge.quickstart.run import Options, run

    if join_job():
        raise ConfigError("quickstart starts its own ranks; run it by itself, not under torchrun or srun")

    return run(
        Options(
            save=Path(options.save).expanduser().resolve(),
            seed=options.seed,
            train_iters=options.train_iters,
            nproc=options.nproc,
            judge=not options.no_check,
        )
    )
