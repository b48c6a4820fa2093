"""``primus submit``: a run, or a grid of runs, as NeMo-Run jobs on Slurm or one after the other on this machine."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from primus_bridge.cli.train import take_stage
from primus_bridge.config import write_run_yaml
from primus_bridge.config.validate import check_world, layout_size, validate
from primus_bridge.errors import ConfigError, did_you_mean
from primus_bridge.files import check_writable

if TYPE_CHECKING:
    from primus_bridge.launch.sbatch import SlurmJob
    from primus_bridge.launch.sweep import Point

HELP = """\
primus submit: a run of primus train, or a grid of runs, as NeMo-Run jobs

usage: primus submit [posttrain|pretrain] --config FILE.yaml --executor local|slurm [options] [overrides of the run]

  --executor local     one after the other on this machine; the command ends when they have
  --executor slurm     one job, or an array for a grid; the command ends when Slurm has it (see --wait)
  --sweep NAME=A,B     a run for each value; several --sweep make a grid; each point saves to SAVE/NAME=A_...
  --dry_run            print the batch script, check everything, write and submit nothing
  --no_check           do not look at model, data and folders here: the job sees others, as in a container
  --job_name NAME      default: the config's name
  --job_dir DIR        configs, scripts, logs and exit codes, in a folder of its own below it; default runs/jobs
  --env NAME=VALUE     a variable of the job; several times

with --executor slurm:
  --account --partition --time                  as sbatch takes them
  --nodes N            default 1
  --gpus_per_node N    one rank a GPU; without it the ranks run on CPUs
  --ntasks_per_node N  ranks of a node without --gpus_per_node; default: what the layout needs
  --container_image IMAGE --container_mounts A:B,C:D
                       (pyxis) the working directory and the job's folder are mounted under their own names
  --dependency SPEC    such as afterok:123; a job whose dependency cannot come true is removed
  --max_parallel N     so many points of a grid at the same time
  --grace SECONDS      ahead of the time limit the run saves and ends, and the job goes back into the queue if it has
                       come on; default 120, 0: never
  --wait               until all has ended; exit code 1 when a job failed

Config, model and data are checked here, before anything is submitted. Every other option is one of primus train.

examples:
  primus submit --config run.yaml --executor slurm --account ACCOUNT --nodes 2 --gpus_per_node 8 --time 04:00:00
  primus submit --config run.yaml --executor slurm --gpus_per_node 1 --use_lora \\
      --sweep lora_rank=8,16 --sweep lr=1e-4,2e-4 --max_parallel 2 --wait
  primus submit --config run.yaml --executor local --sweep seed=1,2,3
"""

EXECUTORS = ("local", "slurm")
SLURM_ONLY = (
    "account",
    "partition",
    "time",
    "nodes",
    "gpus_per_node",
    "ntasks_per_node",
    "container_image",
    "container_mounts",
    "dependency",
    "max_parallel",
    "grace",
    "wait",
)
FLAGS = ("dry_run", "no_check", "wait")
NUMBERS = ("nodes", "gpus_per_node", "ntasks_per_node", "max_parallel", "grace")
REPEATED = ("env", "sweep")
OPTIONS = ("framework", "config", "executor", "job_name", "job_dir", *REPEATED, *FLAGS[:2], *SLURM_ONLY)


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    stage, words = take_stage(argv)
    options, overrides = _options(words)
    _check_options(options)
    from primus_bridge.launch.sweep import points

    runs = points(options.config, overrides, stage, options.sweep)
    for run in runs:
        _check(run, _ranks_per_node(runs, options), options)
    notes = [note for run in runs for note in run.arguments.notes]
    if options.executor == "slurm" and _of_bridge(runs):
        notes.append(
            "engine bridge saves at SIGTERM only: there is no signal ahead of the time limit and no requeue; what has "
            "no checkpoint by then (see save_interval) is lost"
        )
    for note in dict.fromkeys(notes):
        # of a dry run stdout is the script
        print(f"note: {note}", file=sys.stderr if options.dry_run else sys.stdout)
    if options.executor == "local":
        return _run_here(runs, options)
    return _submit(runs, options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see primus submit --help")


def _options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own options, and the words that are the run's."""
    parser = _Parser(prog="primus submit", allow_abbrev=False, add_help=False)
    for name in OPTIONS:
        if name in FLAGS:
            parser.add_argument(f"--{name}", action="store_true")
        elif name in REPEATED:
            parser.add_argument(f"--{name}", action="append", default=[])
        else:
            parser.add_argument(f"--{name}", type=int if name in NUMBERS else str)
    # --job-name is --job_name, as in primus train; a value is left as it is
    dashed = [re.sub(r"^--[^=]+", lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in words]
    options, overrides = parser.parse_known_args(dashed)
    for word in overrides:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8) and not _of_run(name):
            raise ConfigError(f"unknown option '--{name}'{did_you_mean(name, OPTIONS)}", where="command line")
    return options, overrides


def _of_run(name: str) -> bool:
    """Whether the run has an argument of this name."""
    from primus_bridge.config.merge import find
    from primus_bridge.config.primus import table

    return find(table(), name) is not None


def _check_options(options: argparse.Namespace) -> None:
    if options.framework not in (None, "megatron_bridge"):
        raise ConfigError(f"unknown framework '{options.framework}'; megatron_bridge is the only one here")
    if options.executor not in EXECUTORS:
        raise ConfigError(
            f"--executor is {'missing' if options.executor is None else repr(options.executor)}: local or slurm"
            + did_you_mean(options.executor or "", EXECUTORS)
        )
    if options.executor == "local":
        given = [f"--{name}" for name in SLURM_ONLY if getattr(options, name) not in (None, False)]
        if given:
            hint = "; --nproc says how many ranks to start" if "--ntasks_per_node" in given else ""
            raise ConfigError(f"{', '.join(given)} has no meaning with --executor local{hint}")
    for name in NUMBERS:
        value = getattr(options, name)
        if value is not None and value < (0 if name in ("grace", "gpus_per_node") else 1):
            raise ConfigError(f"--{name} must be above 0, got {value}")
    if options.max_parallel is not None and not options.sweep:
        raise ConfigError("--max_parallel is for a grid: give it with --sweep")
    if options.gpus_per_node and options.ntasks_per_node not in (None, options.gpus_per_node):
        raise ConfigError(
            f"--ntasks_per_node {options.ntasks_per_node} beside --gpus_per_node {options.gpus_per_node}: a rank takes "
            "one GPU; leave --ntasks_per_node out"
        )
    if options.container_mounts is not None and options.container_image is None:
        raise ConfigError("--container_mounts is for a container: give --container_image too")
    for text in options.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", text, re.DOTALL):
            raise ConfigError(f"--env takes NAME=VALUE, not '{text}'")
    if options.job_name is not None and not re.fullmatch(r"[\w.+=-]+", options.job_name):
        raise ConfigError(f"--job_name '{options.job_name}': letters, digits and . _ + = - only")


def _ranks_per_node(runs: list[Point], options: argparse.Namespace) -> int:
    """The same for all points, which are one array: what the largest layout needs where nothing is said."""
    needed = max(layout_size(run.arguments) for run in runs)
    return options.ntasks_per_node or options.gpus_per_node or -(-needed // (options.nodes or 1))


def _check(run: Point, ranks_per_node: int, options: argparse.Namespace) -> None:
    """What primus train would refuse in the job, refused here."""
    from primus_bridge.launch.local import ranks_for
    from primus_bridge.preflight import check_run

    arguments = run.arguments
    validate(arguments)
    if options.executor == "slurm":
        ranks = (options.nodes or 1) * ranks_per_node
        each = "--nodes x --gpus_per_node =" if options.gpus_per_node else "--nodes x --ntasks_per_node ="
        if ranks > 1:
            check_world(arguments, ranks, each)
        else:  # a single task starts its own, as on a workstation
            check_world(arguments, _ranks_of_one_task(run, options), "--nproc" if arguments.dist.nproc else each)
    else:
        ranks_for(arguments)
    if not options.no_check:
        check_run(arguments)


def _ranks_of_one_task(run: Point, options: argparse.Namespace) -> int:
    """What ranks_for will say on the node."""
    arguments = run.arguments
    gpus = options.gpus_per_node if arguments.dist.device != "cpu" else None
    return arguments.dist.nproc or gpus or layout_size(arguments)


def _of_bridge(runs: list[Point]) -> bool:
    return any(run.arguments.engine == "bridge" for run in runs)


def _run_here(runs: list[Point], options: argparse.Namespace) -> int:
    name = _name(options)
    labels = [run.label or name for run in runs]
    if options.dry_run:
        for run in runs:
            given = ["--config", options.config] if options.config is not None else []
            print(shlex.join(["primus", "train", "--framework", "megatron_bridge", *given, *run.words]))
        return 0
    run_here = _nemo().run_here
    from primus_bridge.launch.signals import read_stopped

    folder = _job_folder(options, name)
    failures: dict[str, str | None] = dict.fromkeys(labels, "not started")
    for index, (label, run) in enumerate(zip(labels, runs, strict=True)):
        config = folder / f"config_{index}.yaml"
        write_run_yaml(run.arguments, config)
        succeeded, asked = run_here(label, folder, config, _environment(options))
        stopped = read_stopped(run.arguments.save_folder)
        failures[label] = "failed" if not succeeded else f"stopped: {stopped}" if stopped else None
        if asked:
            break
    return _tell(runs, labels, folder, failures)


def _submit(runs: list[Point], options: argparse.Namespace) -> int:
    name = _name(options)
    if options.dry_run:
        print(_nemo().slurm_script(_slurm_job(runs, options, _new_folder(options, name))))
        return 0
    nemo = _nemo()
    from primus_bridge.launch.sbatch import requested, wait

    job = _slurm_job(runs, options, _new_folder(options, name))
    requested(["sbatch", "--version"])
    job.folder.mkdir(parents=True)
    for index, run in enumerate(runs):
        write_run_yaml(run.arguments, job.config(index))
    try:
        job_id = nemo.submit(job)
    except ConfigError:
        shutil.rmtree(job.folder)
        raise
    labels = [run.label or name for run in runs]
    ids = [f"{job_id}_{index}" if job.array else job_id for index in range(len(runs))]
    width = max(map(len, labels))
    for index, (label, run) in enumerate(zip(labels, runs, strict=True)):
        print(f"job {ids[index]}  {label:<{width}}  save {run.arguments.save_folder}  log {job.log(index)}")
    if not options.wait:
        return 0
    return _tell(runs, labels, job.folder, dict(zip(labels, wait(job, job_id), strict=True)))


def _slurm_job(runs: list[Point], options: argparse.Namespace, folder: Path) -> SlurmJob:
    from primus_bridge.launch.sbatch import SlurmJob

    job = SlurmJob(
        name=_name(options),
        folder=folder,
        saves=[run.arguments.save_folder.absolute() for run in runs],
        python="python" if options.container_image is not None else sys.executable,
        directory=Path.cwd(),
        nodes=options.nodes or 1,
        ntasks_per_node=_ranks_per_node(runs, options),
        gpus_per_node=options.gpus_per_node or None,
        account=options.account,
        partition=options.partition,
        time=options.time,
        container_image=options.container_image,
        container_mounts=options.container_mounts.split(",") if options.container_mounts else [],
        env=_environment(options),
        dependency=options.dependency,
        max_parallel=options.max_parallel,
        grace=0 if _of_bridge(runs) else 120 if options.grace is None else options.grace,
    )
    job.check()
    return job


def _tell(runs: list[Point], labels: list[str], folder: Path, failures: dict[str, str | None]) -> int:
    """A line a run; 1 when one is not finished."""
    width = max(map(len, labels))
    for label, run in zip(labels, runs, strict=True):
        print(f"{label:<{width}}  {failures[label] or 'finished'}  {run.arguments.save_folder}")
    failed = [label for label in labels if failures[label] is not None]
    if failed:
        print(f"primus: {len(failed)} of {len(runs)} not finished; logs are in {folder}", file=sys.stderr)
    return 1 if failed else 0


def _nemo():
    try:
        from primus_bridge.launch import nemo
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("nemo_run", "leptonai"):
            raise
        raise ConfigError(f"primus submit needs NeMo-Run ({error}): pip install 'primus-bridge[launch]'") from None
    return nemo


def _name(options: argparse.Namespace) -> str:
    if options.job_name is not None:
        return options.job_name
    stem = Path(options.config).stem if options.config is not None else "run"
    return re.sub(r"[^\w.+=-]+", "-", stem)


def _environment(options: argparse.Namespace) -> dict[str, str]:
    return dict(text.split("=", 1) for text in options.env)


def _new_folder(options: argparse.Namespace, name: str) -> Path:
    parent = Path(options.job_dir or "runs/jobs").absolute()
    check_writable(parent, "--job_dir")
    stem = f"{name}_{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(folder for folder in map(parent.joinpath, names) if not folder.exists())


def _job_folder(options: argparse.Namespace, name: str) -> Path:
    folder = _new_folder(options, name)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
