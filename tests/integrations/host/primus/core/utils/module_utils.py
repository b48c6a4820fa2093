"""The log: information is seen, what is printed is not."""

import sys

debug_lines: list = []


def log_rank_all(msg, *args, **kwargs):
    sys.stdout.write(f"[INFO] {msg}\n")


def debug_rank_all(*args, **kwargs):
    debug_lines.append(kwargs.get("sep", " ").join(map(str, args)))
