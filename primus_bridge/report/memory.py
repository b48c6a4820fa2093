"""Memory by phase in the report: each stage's fullest rank as a bar beside its plan, and every rank's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from primus_bridge.page.document import text
from primus_bridge.report.headline import size
from primus_bridge.report.tables import table

PARTS = ("weights", "gradients", "optimizer", "activations", "buffers")
MOST_RANKS = 64
"""Rows of the table."""


def memory(found: Optional[dict[str, Any]]) -> str:
    """found: what memory.json holds; "" without it."""
    if found is None:
        return ""
    ranks, planned = found["ranks"], found["planned"]["stages"]
    fullest = [
        max((rank for rank in ranks if rank["stage"] == stage), key=lambda rank: rank["total"])
        for stage in range(len(planned))
    ]
    scale = max(_total(each) for each in [*fullest, *planned]) or 1
    bars = "".join(_stage(rank, planned[rank["stage"]], scale, len(planned) > 1) for rank in fullest)
    length, step = found["planned"]["length"], found["step"]
    note = (
        f"Measured up to step {step:,}, on the rank of each stage that held most; planned as primus plan does, for "
        f"sequences of {length:,} tokens, the longest so far. Activations are the most that a step held beside what "
        "it began with."
    )
    legend = "".join(f'<li><i class="{part}"></i>{part}</li>' for part in PARTS)
    heads = ["rank", "stage", *PARTS, "together", "process"]
    heads += ["on the host"] * any(rank["host"] for rank in ranks)
    rows = [_row(rank, len(heads)) for rank in ranks[:MOST_RANKS]]
    more = f'<p class="foot">and {len(ranks) - MOST_RANKS:,} more ranks</p>' if len(ranks) > MOST_RANKS else ""
    return (
        f'<div class="card memory"><p class="note">{note}</p>'
        f'<div class="keys"><ul class="legend" aria-label="Memory">{legend}</ul></div><dl class="bars">{bars}</dl>'
        f"{table(heads, rows, ('',), 'Memory of each rank')}{more}</div>"
    )


def _total(parts: Mapping[str, Any]) -> int:
    return sum(parts.get(part) or 0 for part in PARTS)


def _stage(rank: Mapping[str, Any], planned: Mapping[str, Any], scale: int, several: bool) -> str:
    name = f"Stage {rank['stage']}, rank {rank['rank']}" if several else f"Rank {rank['rank']}"
    return f"<div><dt>{name}</dt><dd>{_bar('measured', rank, scale)}{_bar('planned', planned, scale)}</dd></div>"


def _bar(what: str, parts: Mapping[str, Any], scale: int) -> str:
    there = [(part, parts[part]) for part in PARTS if parts.get(part)]
    said = ", ".join(f"{part} {size(count)}" for part, count in there)
    pieces = "".join(
        f'<i class="{part}" style="width:{100 * count / scale:.3f}%" title="{part}: {size(count)}"></i>'
        for part, count in there
    )
    told = f"{what} {size(_total(parts))}: {said}"
    return f'<div class="bar" role="img" aria-label="{text(told)}">{pieces}</div><span>{text(told)}</span>'


def _row(rank: Mapping[str, Any], columns: int) -> list[str]:
    sizes = [rank[name] for name in (*PARTS, "total", "peak", "host")]
    shown = ["" if count is None else size(count) for count in sizes]
    return [f"{rank['rank']:,}", f"{rank['stage']:,}", *shown][:columns]
