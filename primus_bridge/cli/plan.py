"""``primus plan``: what a run would do, from config.json alone: layout, memory, steps, every argument."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

from primus_bridge.cli.train import take, take_flag, take_stage
from primus_bridge.config import load_arguments
from primus_bridge.config.validate import layout_size
from primus_bridge.errors import ConfigError
from primus_bridge.files import check_output_file, write_json, writing

HELP = """\
primus plan: what a run would do: stages, parameters and memory of a rank, steps, every argument and its source

usage: primus plan [posttrain|pretrain] --config FILE.yaml [--world_size N] [--gpu_memory SIZE] [--data]
                   [--json FILE] [overrides]

  --config FILE      a YAML file of either dialect, as for primus train
  --world_size N     ranks of the job (also --nproc); default: what the layout needs, or every GPU found here
  --gpu_memory SIZE  memory of a GPU, such as 80GB; default: of those found here, else this host's over its ranks
  --data             also read and tokenise the data (kept in the cache for the run): sequences, epochs, the longest
  --json FILE        also write everything as JSON
  overrides          as for primus train

Of the model only config.json is read (of a hub id it is fetched once), of the data nothing without --data. Memory is
that of the largest moment of a step with sequences of seq_length; experts are taken to get equal shares. What does not
fit comes with the smallest changes that do.

examples:
  primus plan --config run.yaml --gpu_memory 80GB
  primus plan --config run.yaml --gpu_memory 192GB --world_size 16 --tensor_model_parallel_size 8 --use_lora
  primus plan --hf_model_name_or_path HF_DIR_OR_ID --seq_length 4096 --precision bf16_mixed --gpu_memory 80GB
"""


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    stage, words = take_stage(argv)
    config, words = take(words, "config")
    ranks, words = take(words, "world_size", "N")
    gpu_memory, words = take(words, "gpu_memory", "80GB")
    json_file, words = take(words, "json")
    count_data, words = take_flag(words, "data")
    if config is None and not words:
        raise ConfigError("nothing to plan: give --config FILE.yaml, or see primus plan --help")
    check_output_file(json_file, "--json")
    world_size = _whole(ranks, "--world_size") if ranks is not None else None
    memory = _bytes(gpu_memory) if gpu_memory is not None else None
    plan(load_arguments(config, words, stage), world_size, memory, count_data, json_file)
    return 0


def plan(
    arguments, world_size: Optional[int], gpu_memory: Optional[int], count_data: bool, json_file: Optional[str]
) -> None:
    """Make the plan, write the file that is asked for, print."""
    from primus_bridge.config.validate import validate_shape
    from primus_bridge.plan.device import find_device, gpu_memories
    from primus_bridge.plan.plan import make_plan
    from primus_bridge.plan.terminal import show

    validate_shape(arguments)
    world_size = world_size or arguments.dist.nproc
    if world_size is None:
        world_size = layout_size(arguments)
        found = len(gpu_memories()) if gpu_memory is None and arguments.dist.device != "cpu" else 0
        world_size = found if found and found % world_size == 0 else world_size
    made = make_plan(arguments, world_size, find_device(gpu_memory, arguments.dist.device, world_size), count_data)
    if json_file is not None:
        # the file first: the terminal may be a pipe that somebody closes
        with writing("the plan", Path(json_file)):
            write_json(Path(json_file), made.to_dict())
    show(made)


def _whole(text: str, option: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option} must be a whole number above 0, got '{text}'")
    return int(text)


def _bytes(text: str) -> int:
    from primus_bridge.conversion.hf_folder import parse_size

    try:
        return parse_size(text)
    except ConfigError:
        raise ConfigError(f"--gpu_memory {text!r} is not a size; give one such as 80GB or 79GiB") from None


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
