"""``primus report``: the page of a run, made again from what its save folder holds."""

from __future__ import annotations

import sys
from pathlib import Path

from primus_bridge.cli.train import take
from primus_bridge.errors import ConfigError, did_you_mean
from primus_bridge.files import check_output_file, writing

HELP = """\
primus report: one HTML page of a run: how it ended, curves, arguments with their sources, token ledger, speed,
layout, environment, and the commands that load and serve the export

usage: primus report SAVE [--html FILE]

  SAVE         the save folder of a run, finished or not
  --html FILE  where to write the page; default SAVE/report.html

The page needs nothing else: no network, no other file. Every run writes it at its end, when it fails, and at
checkpoints; logger.report: false switches that off.

examples:
  primus report runs/first
  primus report runs/first --html first.html
"""


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    html_file, words = take(argv, "html")
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"unknown option '{word}'{did_you_mean(word, ['--html'])}; see primus report --help")
    if len(words) != 1:
        raise ConfigError("give one save folder: primus report SAVE [--html FILE]; see primus report --help")
    folder = Path(words[0])
    if not folder.is_dir():
        raise ConfigError("no such folder; give the save folder of a run", where=str(folder))
    check_output_file(html_file, "--html")
    from primus_bridge.report.page import write_report

    with writing("the report", Path(html_file) if html_file else folder):
        path = write_report(folder, to=Path(html_file) if html_file else None)
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
