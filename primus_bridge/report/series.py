"""The numbers of metrics.jsonl as columns: each line of a short run, buckets of lines of a long one; and sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Optional

import numpy as np

MOST_LINES = 2000
"""Log lines that a page holds one by one; of more it holds BUCKETS of equal width in steps."""
BUCKETS = 1000


@dataclass(frozen=True)
class Lines:
    """Some lines of metrics.jsonl, in their order."""

    steps: np.ndarray
    """int64 [lines]."""
    columns: dict[str, np.ndarray]
    """Of every key with a number in any line, the step left out: float64 [lines], NaN where there is no finite one."""

    @classmethod
    def of(cls, entries: Sequence[dict[str, Any]]) -> Lines:
        steps = np.array([entry["step"] for entry in entries], dtype=np.int64)
        keys = [key for key in dict.fromkeys(chain(*entries)) if key != "step"]
        columns = {key: _column([entry.get(key) for entry in entries]) for key in keys}
        return cls(steps, {key: values for key, values in columns.items() if not np.isnan(values).all()})

    def __len__(self) -> int:
        return len(self.steps)

    def numbers(self, key: str) -> np.ndarray:
        """The numbers of one key without its gaps; empty when there is none."""
        values = self.columns.get(key, np.empty(0))
        return values[~np.isnan(values)]


def _column(values: list[Any]) -> np.ndarray:
    if not set(map(type, values)) <= {int, float, type(None)}:
        values = [value if type(value) in (int, float) else None for value in values]
    out = np.array(values, dtype=np.float64)  # None is NaN
    out[~np.isfinite(out)] = np.nan
    return out


def table(lines: Lines) -> dict[str, Any]:
    """Lines as plain JSON.

    ``lines``: how many there are; ``first`` and ``last``: steps, the same list of numbers when each row is one line;
    ``columns``: key -> ``mean``, and ``low`` and ``high`` when a row is a bucket of several. None: no number.
    """
    steps, columns = lines.steps, {}
    if len(lines) <= MOST_LINES:
        exact = {key: {"mean": _plain(values)} for key, values in lines.columns.items()}
        return {"lines": len(lines), "first": steps.tolist(), "last": steps.tolist(), "columns": exact}
    bucket = (steps - steps[0]) * BUCKETS // (steps[-1] - steps[0] + 1)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    ends = np.append(starts[1:], len(steps)) - 1
    for key, values in lines.columns.items():
        there = np.add.reduceat(~np.isnan(values), starts, dtype=np.float64)
        total = np.add.reduceat(np.nan_to_num(values), starts)
        mean = np.divide(total, there, out=np.full(len(starts), np.nan), where=there > 0)
        low, high = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
        columns[key] = {name: _rounded(part) for name, part in (("mean", mean), ("low", low), ("high", high))}
    return {"lines": len(lines), "first": steps[starts].tolist(), "last": steps[ends].tolist(), "columns": columns}


def _plain(values: np.ndarray) -> list[Optional[float]]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _rounded(values: np.ndarray) -> list[Optional[float]]:
    """To six digits: a bucket is drawn a pixel wide."""
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in values.tolist()]


@dataclass(frozen=True)
class Spread:
    """Of one number over the log lines."""

    low: float
    """5 of 100 lines are below."""
    median: float
    high: float
    """5 of 100 lines are above."""
    largest: float


def spread(lines: Lines, key: str) -> Optional[Spread]:
    """None when no line has the number."""
    values = lines.numbers(key)
    if not len(values):
        return None
    low, median, high = np.percentile(values, (5, 50, 95)).tolist()
    return Spread(low, median, high, float(values.max()))


@dataclass(frozen=True)
class Totals:
    """steps: how many the log lines stand for; tokens and seconds: of those steps, evaluations and saves left out."""

    steps: int
    tokens: int
    seconds: float


def totals(lines: Lines, starts: Sequence[int]) -> Totals:
    """Sums over the training lines, each of which stands for the steps since the line or the start before it.

    starts: the steps at which the run was started; 0 when nothing is known of them.
    """
    before = np.concatenate([[-1], lines.steps[:-1]])
    begun = np.sort(np.array([0, *starts], dtype=np.int64))
    # the last start before each line: its counters began there
    since = begun[np.searchsorted(begun, lines.steps, side="left") - 1]
    counts = lines.steps - np.maximum(before, since)
    unknown = np.full(len(lines), np.nan)
    seconds = counts * lines.columns.get("step_time", unknown)
    tokens = seconds * lines.columns.get("tokens_per_second", unknown)
    return Totals(int(counts.sum()), round(float(np.nansum(tokens))), float(np.nansum(seconds)))
