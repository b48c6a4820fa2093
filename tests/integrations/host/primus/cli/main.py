"""primus COMMAND ..., as Primus has it: reads sys.argv, reports an error to its log, and exits with 1."""

import argparse
import importlib
import sys
import traceback


def main():
    parser = argparse.ArgumentParser(prog="primus")
    parser.add_argument("--debug", action="store_true")
    subparsers = parser.add_subparsers(dest="command", required=True)
    command = next(word for word in sys.argv[1:] if not word.startswith("-"))
    importlib.import_module(f"primus.cli.subcommands.{command}").register_subcommand(subparsers)
    args, unknown = parser.parse_known_args()
    try:
        args.func(args, unknown)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1)  # noqa: B904
