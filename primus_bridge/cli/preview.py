"""``primus preview``: what the data of a config becomes, on the terminal, as JSON lines and as an HTML page."""

from __future__ import annotations

import sys
from pathlib import Path

from primus_bridge.cli.train import take, take_config, take_stage
from primus_bridge.config import load_arguments
from primus_bridge.config.validate import validate_data
from primus_bridge.errors import ConfigError
from primus_bridge.files import check_output_file, write_text, writing

HELP = """\
primus preview: what the data becomes: tokens, loss mask, turns, pack segments, position ids

usage: primus preview [posttrain|pretrain] [--config FILE.yaml] [--num N] [--split train|validation]
                      [--json FILE] [--html FILE] [overrides]

  --config FILE   a YAML file of either dialect, as for primus train; read are its data, tokenizer and seq_length
  --num N         how many sequences, the first ones in the order of training; default 3
  --split NAME    train or validation; default train
  --json FILE     also a line a sequence: ids, loss_weights, position_ids, segments, turns, roles, pieces, text,
                  supervised_text, sources
  --html FILE     also one page that needs nothing else: every token with its facts, and length histograms
  overrides       as for primus train

On a terminal tokens are coloured by loss weight; without colour (NO_COLOR, a pipe) what is supervised is in brackets.
Below them stands the token ledger of the whole data set. What is tokenised is kept in the cache for the run.

examples:
  primus preview --config examples/llama_sft_posttrain.yaml --hf_model_name_or_path HF_DIR
  primus preview --config run.yaml --num 20 --html preview.html --json preview.jsonl
  primus preview --data_path chats.jsonl --tokenizer_model HF_DIR --prompt_template chatml --split validation \\
      --validation_split 0.1
"""

DEFAULT_NUM = 3
SPLITS = ("train", "validation")


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    stage, words = take_stage(argv)
    config, words = take_config(words)
    number, words = take(words, "num", "N")
    split, words = take(words, "split", "train|validation")
    json_file, words = take(words, "json")
    html_file, words = take(words, "html")
    if config is None and not words:
        raise ConfigError("nothing to preview: give --config FILE.yaml, or see primus preview --help")
    split = split or "train"
    if split not in SPLITS:
        raise ConfigError(
            f"--split must be train or validation, got '{split}'; another split of the data itself is data.split"
        )
    check_output_file(json_file, "--json")
    check_output_file(html_file, "--html")
    arguments = load_arguments(config, words, stage)
    validate_data(arguments)
    preview(arguments, split, _count(number), json_file, html_file)
    return 0


def preview(arguments, split: str, num: int, json_file: str | None, html_file: str | None) -> None:
    """Read the data, write the files that are asked for, print the first sequences."""
    from primus_bridge.preview.page import html_page
    from primus_bridge.preview.report import collect, to_json_lines
    from primus_bridge.preview.terminal import show

    found = collect(arguments, split, num)
    # the files first: the terminal may be a pipe that somebody closes
    for file, made in ((json_file, lambda: to_json_lines(found.sequences)), (html_file, lambda: html_page(found))):
        if file is not None:
            with writing("the preview", Path(file)):
                write_text(Path(file), made())
    show(found)


def _count(text: str | None) -> int:
    if text is None:
        return DEFAULT_NUM
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--num must be a whole number above 0, got '{text}'")
    return int(text)


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
