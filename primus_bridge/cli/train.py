"""``primus train``: resolve the arguments, check what is cheap to check, then run them here or on local ranks."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from typing import Optional

from primus_bridge.config import BridgeArguments, describe, load_arguments, schema
from primus_bridge.config.validate import check_world, layout_size, validate
from primus_bridge.errors import ConfigError

HELP = """\
primus train: supervised fine-tuning, LoRA, or pretraining, from one YAML

usage: primus train [posttrain|pretrain] --framework megatron_bridge [--config FILE.yaml]
                    [--nproc N] [--dry_run] [overrides]

  posttrain | pretrain   the stage; default: 'stage' of the file, else posttrain for the flat dialect and pretrain for
                         Primus's experiment dialect
  --framework NAME       megatron_bridge, the only one here
  --config FILE          a YAML file of any dialect; --exp FILE, as Primus has it, is the same
  --nproc N              local ranks to start; default: what the layout needs on CPU, every GPU on GPU
  --engine bridge        Megatron-Bridge's own finetune in place of ours; with --dry_run its ConfigContainer as YAML
  --dry_run              print every argument and where it came from, check the files, write nothing
  overrides              --key value, --flag, --section.key value, section.key=value; later wins

overrides that need no section:
  model and data         --convert_from_hf --hf_model_name_or_path --load --data_path --seq_length
  training               --lr --min_lr --train_iters --num_epochs --micro_batch_size --global_batch_size --seed --stage
  layout                 --tensor_model_parallel_size --pipeline_model_parallel_size
  LoRA                   --use_lora --lora_rank --lora_alpha --lora_dropout --use_rslora --use_dora
  out                    --save --convert_to_hf --hf_save_path --wandb_project --no-wandb
  and every other argument by its name; --dry_run lists them all

Under torchrun or srun (RANK and WORLD_SIZE, or SLURM_PROCID, set) the process joins that job instead of starting ranks.

examples:
  primus train --framework megatron_bridge --config examples/llama_sft_posttrain.yaml --load CKPT --save out
  primus train posttrain --framework megatron_bridge --convert_from_hf --hf_model_name_or_path HF_DIR_OR_ID \\
      --data_path alpaca.json --lr 5e-6 --train_iters 5000 --save out
  primus train --framework megatron_bridge --config run.yaml --use_lora --lora_rank 16 --lora_alpha 32
  primus train --framework megatron_bridge --config run.yaml --tensor_model_parallel_size 2 --nproc 4 --dry_run
  torchrun --standalone --nproc-per-node 8 -m primus_bridge.cli.main train --framework megatron_bridge --config run.yaml
"""

ENTRY = "primus_bridge.launch.entry:run_training"


def main(argv: list[str]) -> int:
    """``primus train`` with the words after it; the exit code."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    stage, words = take_stage(argv)
    if stage not in (None, "posttrain", "pretrain"):
        raise ConfigError(f"unknown stage '{stage}': primus train [posttrain|pretrain] --config FILE ...")
    config, words = take_config(words)
    dry_run, words = take_flag(words, "dry_run")
    if config is None and not words:
        raise ConfigError("nothing to train: give --config FILE.yaml, or see primus train --help")
    return train(load_arguments(config, words, stage), dry_run=dry_run)


def train(arguments: BridgeArguments, dry_run: bool = False) -> int:
    """Check, then print (dry run) or run; raises ConfigError before anything is written."""
    from primus_bridge.preflight import check_run

    validate(arguments)
    if dry_run:
        check_world(arguments, arguments.dist.nproc or layout_size(arguments))
        if arguments.engine == "bridge":
            print_container(arguments)
        else:
            print_arguments(arguments)
            check_run(arguments)
            print_notes(arguments)
        return 0
    from primus_bridge.launch.environment import join_job

    if join_job():
        return _join(arguments)
    from primus_bridge.launch.entry import payload
    from primus_bridge.launch.local import launch, ranks_for

    nproc = ranks_for(arguments)
    check_run(arguments)
    print_notes(arguments)
    return launch(ENTRY, payload(arguments), nproc)


def print_arguments(arguments: BridgeArguments) -> None:
    """A line an argument: name, value, source."""
    rows = [(name, schema.typed(value), source) for name, value, source in describe(arguments)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, source in rows:
        print(f"{name:<{widths[0]}}  {value:<{min(widths[1], 40)}}  {source}")


def print_notes(arguments: BridgeArguments) -> None:
    """What ``arguments`` say that changes nothing, and the like, a line each."""
    for note in arguments.notes:
        print(f"note: {note}")


def print_container(arguments: BridgeArguments) -> None:
    """Megatron-Bridge's ConfigContainer as YAML, the notes before it as comments."""
    from primus_bridge.bridge.container import build_container, container_yaml
    from primus_bridge.preflight import check_bridge

    with redirect_stdout(sys.stderr):  # where what it logs as it is imported belongs
        container = build_container(arguments, check_bridge(arguments, weights=False))
    for note in arguments.notes:
        print(f"# note: {note}")
    print(container_yaml(container), end="")


def _join(arguments: BridgeArguments) -> int:
    """Run as one rank of a job that torchrun or Slurm started."""
    from primus_bridge.launch.entry import run_rank
    from primus_bridge.launch.joined import as_one_rank

    def work() -> None:
        world_size = int(os.environ["WORLD_SIZE"])
        check_world(arguments, world_size)
        if os.environ["RANK"] == "0":
            if arguments.dist.nproc not in (None, world_size):
                print(f"note: --nproc {arguments.dist.nproc} has no effect: {world_size} ranks were started already")
            print_notes(arguments)
        run_rank(arguments)

    return as_one_rank(work)


def take_stage(argv: list[str]) -> tuple[Optional[str], list[str]]:
    """The stage, where the first word is no option, and the words after it."""
    if argv and not argv[0].startswith("-") and "=" not in argv[0]:
        return argv[0], argv[1:]
    return None, list(argv)


def take(
    words: list[str], name: str, metavar: str = "FILE", last_wins: bool = False
) -> tuple[Optional[str], list[str]]:
    """The value of --name and the words without it. Raises ConfigError for two values, but where the last wins."""
    value, rest, index = None, [], 0
    while index < len(words):
        key, equals, text = words[index].partition("=")
        index += 1
        if key.replace("-", "_") != f"__{name}":
            rest.append(words[index - 1])
            continue
        if not equals:
            if index == len(words) or words[index].startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name} {metavar}")
            text = words[index]
            index += 1
        if value not in (None, text) and not last_wins:
            raise ConfigError(f"--{name} is given twice, {value} and {text}: one file may extend the other")
        value = text
    return value, rest


def take_config(words: list[str]) -> tuple[Optional[str], list[str]]:
    """The file of --config, or of --exp, Primus's other name of it, and the words without them."""
    config, words = take(words, "config")
    same, words = take(words, "exp")
    if None not in (config, same) and config != same:
        raise ConfigError(f"--config {config} and --exp {same} are two names of one option: keep one")
    return same if config is None else config, words


def take_flag(words: list[str], name: str) -> tuple[bool, list[str]]:
    """Whether --name is there (or --name true|false), and the words without it."""
    found, rest, index = False, [], 0
    while index < len(words):
        word, equals, text = words[index].partition("=")
        index += 1
        if word.replace("-", "_") != f"__{name}":
            rest.append(words[index - 1])
            continue
        if not equals and index < len(words) and words[index].lower() in ("true", "false"):
            text = words[index]
            index += 1
        if text.lower() not in ("", "true", "false"):
            raise ConfigError(f"--{name} is a flag, true or false, not '{text}'", where="command line")
        found = text.lower() != "false"
    return found, rest


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
