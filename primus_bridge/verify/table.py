"""The report of ``primus verify`` on a terminal: a line a stage, then what diverges first."""

from __future__ import annotations

import sys
from typing import Any, Optional


def show(report: dict[str, Any]) -> None:
    """Print a report (verify/report.py's JSON): coloured on a terminal, plain text elsewhere."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=160, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "max abs error", "relative error", "", "worst tensor"):
        table.add_column(column, justify="right" if "error" in column else "left", overflow="fold")
    for line in report["stages"]:
        verdict = "[green]ok[/green]" if line["equal"] else "[red]DIFFERS[/red]"
        numbers = (_number(line["max_abs_error"]), _number(line["relative_error"]))
        table.add_row(line["stage"], *numbers, verdict, line.get("tensor", ""))
    console.print(table)
    console.print()
    console.print(verdict_of(report), markup=False, soft_wrap=True)


def verdict_of(report: dict[str, Any]) -> str:
    """One or two sentences: equal, or what diverges first and which tensor there is worst."""
    first: Optional[dict[str, Any]] = report["first"]
    if first is None:
        return f"equal: every relative error is at most {report['tolerance']:.1e}"
    inside = {"attention": " in its attention", "mlp": " in its MLP"}.get(first["part"] or "", "")
    text = f"DIFFERS first at {first['stage']}{',' + inside if inside else ''}"
    text += f" (relative error {_number(first['relative_error'])})"
    if first["tensor"] is None:
        text += "; no tensor there differs by its gradient"
    else:
        text += f"; worst {first['tensor_by']} there: {first['tensor']} ({_number(first['tensor_relative_error'])})"
    return f"{text}\n{first['hint']}" if first["hint"] else text


def _number(value: Optional[float]) -> str:
    return "not finite" if value is None else f"{value:.1e}"
