"""``primus verify``: a Hugging Face model in transformers and in Megatron, compared stage by stage."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from primus_bridge.cli.convert import Parser
from primus_bridge.errors import ConfigError
from primus_bridge.files import check_output_file

DESCRIPTION = """\
Runs the same weights in transformers and in Megatron-Core, forward and backward, and compares the output of the
embedding, of every layer and of the final norm, the logits, the loss and every gradient. Prints a line a stage, and
which layer and tensor diverge first. Exit code 0: equal; 1: they differ; 2: something to mend in the command.
"""
EPILOG = """\
An error is relative: max |Megatron - transformers| over max |transformers| of the same tensor. The tolerance is
1e-5 x sqrt(layers) in fp32, where rounding adds up over the layers like a random walk, and 0.15 in bf16, which finds
a wrong weight but not every wrong constant.
Experts are chosen by comparing scores, so a near tie can fall differently on the two sides (rarely in fp32, often in
bf16), and then every later stage differs for that token.

examples:
  primus verify --hf HF_DIR --shrink
  primus verify --hf HF_DIR --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2
  primus verify --hf MOE_DIR --shrink --expert_model_parallel_size 2 --nproc 2 --json verdict.json
  primus verify --hf EXPORTED_DIR --against ORIGINAL_DIR
  torchrun --standalone --nproc-per-node 8 -m primus_bridge.cli.main verify --hf HF_DIR --tensor_model_parallel_size 8
"""
ENTRY = "primus_bridge.verify.run:verify_rank"


def parser() -> Parser:
    """The options of the command."""
    p = Parser(
        prog="primus verify",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--hf", metavar="DIR_OR_ID", help="the Hugging Face folder or hub id")
    p.add_argument(
        "--against",
        metavar="DIR_OR_ID",
        help="transformers runs this one instead, such as an export's source",
    )
    p.add_argument(
        "--shrink",
        action="store_true",
        help="the same architecture with few layers, small width and random weights; of --hf only config.json is read",
    )
    for name, metavar, text in (
        ("tensor_model_parallel_size", "T", "ranks that share a layer; default 1"),
        ("pipeline_model_parallel_size", "P", "pipeline stages; default 1"),
        ("expert_model_parallel_size", "E", "ranks that share out the experts; default 1"),
    ):
        p.add_argument(f"--{name}", type=int, default=1, metavar=metavar, help=text)
    p.add_argument("--expert_tensor_parallel_size", type=int, metavar="T", help="ranks that share an expert; default T")
    p.add_argument("--sequence_parallel", action="store_true", help="with tensor parallelism, shard the sequence too")
    p.add_argument(
        "--nproc", type=int, metavar="N", help="local ranks, more are data parallel; default: what the layout needs"
    )
    p.add_argument(
        "--seq_length",
        type=int,
        metavar="N",
        help="tokens a row; default: 96 with --shrink, else 128, or more "
        "to pass a window or original context length of at most 1024 tokens (8192 on a GPU)",
    )
    p.add_argument("--batch", type=int, metavar="N", help="rows; default 4")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of both models; default fp32")
    p.add_argument("--tolerance", type=float, metavar="X", help="largest relative error that is equal; default: below")
    p.add_argument("--seed", type=int, default=1234, metavar="S", help="of the tokens and random weights; default 1234")
    p.add_argument("--json", metavar="FILE", help="also write every number, each gradient's too, as JSON")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is one")
    return p


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    words = parser().parse(argv)
    if words.hf is None:
        raise ConfigError("which model? give --hf, a Hugging Face folder or hub id; see primus verify --help")
    check_output_file(words.json, "--json")
    if words.nproc is not None and words.nproc < 1:
        raise ConfigError(f"--nproc must be above 0, got {words.nproc}")
    from primus_bridge.launch.environment import choose_device, join_job
    from primus_bridge.verify.plan import Options, make_plan

    values = {name: value for name, value in vars(words).items() if name not in ("json", "nproc")}
    options = Options(**values)
    if join_job():
        return _join(options, words.json)
    choose_device(options.device)
    from primus_bridge.launch.local import launch

    plan = make_plan(options, words.nproc)
    with tempfile.TemporaryDirectory(prefix="primus_verify_") as work:
        code = launch(ENTRY, {"options": asdict(options), "work": work}, plan.ranks)
        if code:
            return code
        from primus_bridge.verify.run import REPORT

        report = json.loads((Path(work) / REPORT).read_text(encoding="utf-8"))
    return _tell(report, words.json)


def _join(options: Any, file: str | None) -> int:
    """Compare as one rank of a job that torchrun or Slurm started."""
    from primus_bridge.launch.environment import choose_device
    from primus_bridge.launch.joined import as_one_rank

    equal = []

    def work() -> None:
        choose_device(options.device)  # before megatron.core is imported
        from primus_bridge.megatron.parallel import finalize
        from primus_bridge.verify.run import verify

        report = verify(options)
        finalize()
        if os.environ["RANK"] == "0":
            _tell(report.to_json(), file)
        equal.append(report.equal)

    return as_one_rank(work) or (0 if equal[0] else 1)


def _tell(report: dict[str, Any], file: str | None) -> int:
    """Print and write the report; the exit code."""
    from primus_bridge.files import write_json, writing
    from primus_bridge.verify.table import show

    show(report)
    if file is not None:
        with writing("the report", Path(file)):
            write_json(Path(file), report)
    return 0 if report["equal"] else 1


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
