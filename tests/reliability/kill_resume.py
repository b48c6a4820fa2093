"""Kill a run at random moments, again and again, and compare what it comes to with the same run left alone.

    python -m tests.reliability.kill_resume --kills 100 --nproc 2          # about 15 minutes on two cores
    python -m tests.reliability.kill_resume --kills 10 --saves async --only LoRA --json kills.json

Each configuration (all weights or LoRA, fp32 or bf16, one rank, TP2, PP2, DP2; dropout is on, so that random numbers
matter) is trained once without a break. Then in rounds, a configuration each, with synchronous and asynchronous saves
in turn: the same run is started, killed with SIGKILL (one rank, all ranks or the launcher), started again, and so on
until it is done. Half of the kills come at a moment uniform over what is left of the run, half are aimed at a save: 0
to 50 ms after a checkpoint's folder, its first shard or its manifest appears. Most lives are ranks forked from a server
that has imported torch already, every sixth is the real command.

After each kill: nobody is left alive, each checkpoint with a manifest is whole, the newest is no older than before, and
the next life says that it continues it. After each round: the losses of metrics.jsonl, the weights, the optimizer's
state and all the rest of the last checkpoint equal those of the unbroken run to the bit.
Exit code 1, and a line for each fault, when anything of that fails; the folders of such a round are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.reliability.lives import use_fork_server  # noqa: E402
from tests.reliability.outcome import PARTS  # noqa: E402
from tests.reliability.rounds import WHOM, Bench, Configuration, Round, Row, Unbroken  # noqa: E402

LORA = {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.1, "hidden_dropout": 0.1}
FULL = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
BF16 = {"mixed_precision": "bf16_mixed"}

CONFIGURATIONS = (
    Configuration("all weights, fp32, DP2", 2, FULL | {"neftune_noise_alpha": 5}),
    Configuration("LoRA, bf16, 1 rank", 1, LORA | BF16),
    Configuration("all weights, bf16, TP2", 2, FULL | BF16 | {"tensor_model_parallel_size": 2}),
    Configuration("LoRA, fp32, PP2", 2, LORA | {"pipeline_model_parallel_size": 2}),
    Configuration("all weights, fp32, 1 rank", 1, FULL),
    Configuration("LoRA, bf16, DP2", 2, LORA | BF16),
    Configuration(
        "all weights, bf16, TP2 PP2",
        4,
        FULL | BF16 | {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ),
)


TOTALS = "rounds asynchronous during_save commands resumes steps_lost half_written seconds".split()
"""Columns with a sum."""


def print_table(rows: list[Row], console: Any) -> None:
    from rich.table import Table

    table = Table(show_footer=True)
    total = Row("all", 0)
    for row in rows:
        for whom in WHOM:
            total.kills[whom] += row.kills[whom]
        for name in TOTALS:
            setattr(total, name, getattr(total, name) + getattr(row, name))

    def cells(row: Row) -> list[str]:
        kinds = "/".join(str(row.kills[whom]) for whom in WHOM)
        killed = sum(row.kills.values())
        moments = f"{row.during_save}/{killed - row.during_save}"
        rounds = f"{row.rounds} ({row.asynchronous})"
        numbers = [rounds, killed, kinds, moments, row.commands, row.resumes, row.steps_lost, row.half_written]
        return [str(number) for number in numbers]

    headings = [
        "rounds (async)",
        "kills",
        "rank/all/launcher",
        "in a save/else",
        "of the command",
        "resumes",
        "steps lost",
        "half-written",
    ]
    table.add_column("configuration", footer="all")
    for heading, sum_ in zip(headings, cells(total), strict=True):
        table.add_column(heading, footer=sum_, justify="right")
    for part in PARTS:
        table.add_column(part, footer="equal" if all(row.equal[part] for row in rows) else "DIFFER")
    table.add_column("s", footer=f"{total.seconds:.0f}", justify="right")
    for row in rows:
        equal = ["equal" if row.equal[part] else "DIFFER" for part in PARTS]
        table.add_row(row.configuration, *cells(row), *equal, f"{row.seconds:.0f}")
    console.print(table)


def _chosen(options: argparse.Namespace) -> list[Configuration]:
    return [one for one in CONFIGURATIONS if one.nproc <= options.nproc and options.only in one.name]


def run(options: argparse.Namespace, work: Path) -> tuple[list[Row], list[str]]:
    """The rows of the table and the faults."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    use_fork_server()
    dice, faults = random.Random(options.seed), []
    bench = Bench(work, options.steps, options.save_interval)
    chosen = _chosen(options)
    rows: dict[str, Row] = {}
    unbroken: dict[str, Unbroken] = {}
    lives = 0

    def command() -> bool:
        nonlocal lives
        lives += 1
        return bool(options.command_every) and lives % options.command_every == 0

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("kills", total=options.kills)
        number = 0
        while (done := sum(sum(row.kills.values()) for row in rows.values())) < options.kills and len(faults) < 10:
            configuration = chosen[number % len(chosen)]
            number += 1
            name = configuration.name
            progress.update(bar, description=name)
            if name not in unbroken:
                unbroken[name] = bench.unbroken(configuration)
                rows[name] = Row(name, configuration.nproc)
            folder = work / f"round_{number:03d}"

            def fault(words: str, where: str = f"{folder.name} ({name})") -> None:
                faults.append(f"{where}: {words}")
                progress.console.print(f"FAULT {faults[-1]}", markup=False, highlight=False)

            before = len(faults)
            # in turn over configurations and over the rounds of each
            in_turn = bool((chosen.index(configuration) + rows[name].rounds) % 2)
            asynchronous = {"sync": False, "async": True, "both": in_turn}[options.saves]
            one = Round(bench, configuration, unbroken[name], rows[name], folder, asynchronous, dice, fault)
            one.run(min(options.kills_a_round, options.kills - done), command, lambda: progress.advance(bar))
            saves = "asynchronous" if asynchronous else "synchronous"
            verdict = "equal to the unbroken run" if len(faults) == before else f"{len(faults) - before} faults"
            progress.console.print(f"round {number}, {name}, {saves} saves: {verdict}", highlight=False)
            if len(faults) == before:
                shutil.rmtree(folder)
    return list(rows.values()), faults


def parse(words: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=100)
    add("--nproc", type=int, default=2, help="configurations of at most this many ranks")
    add("--only", default="", help="configurations whose name has this text")
    add("--seed", type=int, default=0, help="of the moments and of who is killed")
    add("--saves", choices=("sync", "async", "both"), default="both", help="of the killed runs; both: in turn")
    add("--async", dest="saves", action="store_const", const="async", default=argparse.SUPPRESS, help="--saves async")
    add("--kills_a_round", type=int, default=5)
    add("--steps", type=int, default=60, help="of a run")
    add("--save_interval", type=int, default=3)
    add("--command_every", type=int, default=6, help="every so many lives the real command; 0: never")
    add("--folder", type=Path, help="where the runs' folders go; default TMPDIR")
    add("--json", type=Path, help="write the rows and faults here")
    options = parser.parse_args(words)
    if not _chosen(options):
        parser.error(f"no configuration of {options.nproc} ranks has '{options.only}' in its name")
    return options


def main(words: list[str]) -> int:
    from rich.console import Console

    options = parse(words)
    began = time.time()
    work = Path(tempfile.mkdtemp(prefix="kill_resume-", dir=options.folder))
    rows, faults = run(options, work)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(
        f"{sum(sum(row.kills.values()) for row in rows)} kills in {sum(row.rounds for row in rows)} rounds of "
        f"{options.steps} steps, a save every {options.save_interval}; seed {options.seed}; "
        f"{time.time() - began:.0f} s on {os.cpu_count()} cores"
    )
    print_table(rows, console)
    slowest, ended = max(row.slowest_end for row in rows), sum(row.ended_by_launcher for row in rows)
    console.print(
        f"after a kill nobody was left within {slowest:.1f} s; ranks that a launcher had to end: {ended} times"
    )
    for fault in faults:
        print(f"FAULT {fault}")
    if options.json:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "faults": faults}, indent=2) + "\n")
    if faults:
        print(f"kept: {work}")
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
