"""Columns, buckets and sums of log lines against plain loops over them."""

from __future__ import annotations

import math
import random

import pytest

from primus_bridge.report.series import BUCKETS, MOST_LINES, Lines, spread, table, totals
from tests.report.folders import line


def test_a_short_run_is_held_line_by_line():
    entries = [line(step, loss=value) for step, value in ((10, 0.1 + 0.2), (20, None), (30, float("inf")), (40, 7))]
    entries[1]["note"], entries[3]["grad_norm"] = "text", True
    found = table(Lines.of(entries))
    assert found["lines"] == 4 and found["first"] == found["last"] == [10, 20, 30, 40]
    assert found["columns"]["loss"] == {"mean": [0.1 + 0.2, None, None, 7.0]}
    assert found["columns"]["grad_norm"]["mean"][3] is None
    assert "note" not in found["columns"] and "step" not in found["columns"]


def test_nothing_logged():
    assert table(Lines.of([])) == {"lines": 0, "first": [], "last": [], "columns": {}}
    assert totals(Lines.of([]), [0]).steps == 0 and spread(Lines.of([]), "loss") is None


def test_a_long_run_is_held_in_buckets_that_keep_every_extreme():
    random.seed(0)
    steps = sorted(random.sample(range(5, 90_000), MOST_LINES + 3000))
    losses = [None if step % 13 == 0 else 100.0 if step == steps[777] else random.random() for step in steps]
    entries = [line(step, loss=loss) for step, loss in zip(steps, losses, strict=True)]
    for entry in entries[:200]:
        entry["grad_norm"] = float("nan")
    found = table(Lines.of(entries))
    assert found["lines"] == len(steps) and len(found["first"]) <= BUCKETS
    width = (steps[-1] - steps[0] + 1) / BUCKETS
    column, seen = found["columns"]["loss"], 0
    for row, (first, last) in enumerate(zip(found["first"], found["last"], strict=True)):
        assert last - first <= width
        inside = [loss for step, loss in zip(steps, losses, strict=True) if first <= step <= last]
        there = [loss for loss in inside if loss is not None]
        seen += len(inside)
        expected = (sum(there) / len(there), min(there), max(there)) if there else (None, None, None)
        got = tuple(column[name][row] for name in ("mean", "low", "high"))
        assert got == (pytest.approx(expected, rel=1e-5) if there else expected)
    assert seen == len(steps)  # each line is in one bucket
    assert max(value for value in column["high"] if value is not None) == 100.0
    assert found["columns"]["grad_norm"]["mean"][0] is None


def test_spread():
    found = spread(Lines.of([line(step, step_time=float(step)) for step in range(101)]), "step_time")
    assert (found.low, found.median, found.high, found.largest) == (5.0, 50.0, 95.0, 100.0)


def test_totals_count_the_steps_between_lines_and_since_a_start():
    # logged every 10 steps at 2 s and 500 tokens/s; resumed at 14, whose first line stands for 6 steps; loaded at none
    lines = Lines.of([line(step) for step in (10, 20, 30)])
    whole = totals(lines, [0])
    assert (whole.steps, whole.seconds, whole.tokens) == (30, 60.0, 30_000)
    assert totals(lines, [0, 14]).steps == 10 + 6 + 10
    # a run that takes another's checkpoint of step 8 has done two steps at its first line
    assert totals(lines, [8]).steps == 22
    assert math.isclose(totals(Lines.of([line(10, step_time=None), line(20)]), [0]).seconds, 20.0)
