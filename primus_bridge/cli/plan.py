"""``primus plan``: what a run would do, from config.json alone: layout, memory, steps, every argument."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

from primus_bridge.cli.train import take, take_config, take_flag, take_stage
from primus_bridge.config import BridgeArguments, load_arguments
from primus_bridge.config.validate import layout_size
from primus_bridge.errors import ConfigError
from primus_bridge.files import check_output_file, write_json, writing

HELP = """\
primus plan: what a run would do: stages, parameters and memory of a rank, steps, every argument and its source

usage: primus plan [posttrain|pretrain] --config FILE.yaml [--world_size N] [--gpu_memory SIZE] [--data]
                   [--json FILE] [overrides]

  --config FILE      a YAML file of either dialect, as for primus train
  --world_size N     ranks of the job, as --nproc: the last one counts; default: what the layout needs, or every GPU
                     found here
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
    config, words = take_config(words)
    gpu_memory, words = take(words, "gpu_memory", "80GB", last_wins=True)
    json_file, words = take(words, "json")
    count_data, words = take_flag(words, "data")
    if config is None and not words:
        raise ConfigError("nothing to plan: give --config FILE.yaml, or see primus plan --help")
    check_output_file(json_file, "--json")
    memory = _bytes(gpu_memory) if gpu_memory is not None else None
    plan(load_arguments(config, _as_nproc(words), stage), memory, count_data, json_file)
    return 0


def plan(arguments: BridgeArguments, gpu_memory: Optional[int], count_data: bool, json_file: Optional[str]) -> None:
    """Make the plan, write the file that is asked for, print."""
    from primus_bridge.config.validate import validate_shape
    from primus_bridge.plan.device import find_device, gpu_memories
    from primus_bridge.plan.plan import make_plan
    from primus_bridge.plan.terminal import show

    validate_shape(arguments)
    world_size = arguments.dist.nproc
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


def _as_nproc(words: list[str]) -> list[str]:
    """The words with --world_size as --nproc, which it is: of both, and of a file's, the last counts."""
    renamed = []
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.replace("-", "_") == "__world_size":
            value = value if equals else "".join(words[index + 1 : index + 2])
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"--world_size must be a whole number above 0, got '{value}'")
            word = "--nproc" + word.removeprefix(option)
        renamed.append(word)
    return renamed


def _bytes(text: str) -> int:
    from primus_bridge.conversion.hf_folder import parse_size

    try:
        size = parse_size(text)
    except ConfigError:
        raise ConfigError(f"--gpu_memory {text!r} is not a size; give one such as 80GB or 79GiB") from None
    if size < 10**9:
        raise ConfigError(f"--gpu_memory {text} is {size:,} bytes, less than any GPU has; give one such as 80GB")
    return size


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
