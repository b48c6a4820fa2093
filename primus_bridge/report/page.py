"""The report as one HTML page, and the charts whose numbers it holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.files import write_text
from primus_bridge.page.document import document, switch, text
from primus_bridge.report import headline, sections
from primus_bridge.report.collect import Report, collect
from primus_bridge.report.memory import PARTS, memory
from primus_bridge.report.notes import REPORT_FILE
from primus_bridge.report.series import BUCKETS, table


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str = ""
    factor: float = 1.0
    """From the number in metrics.jsonl to the unit."""
    zero: bool = True
    """Whether a linear axis begins at 0."""
    smooth: bool = True
    """False for what is known exactly."""


CHARTS = {
    "loss": Chart("Loss", "mean over supervised tokens, nats", zero=False),
    "lr": Chart("Learning rate", "at each optimizer step", smooth=False),
    "grad_norm": Chart("Gradient norm", "before clipping"),
    "tokens_per_second": Chart("Throughput", "tokens per second, all ranks"),
    "step_time": Chart("Step time", "seconds"),
    "memory": Chart("Peak memory", "GiB, rank 0", factor=2.0**-30, smooth=False),
    "tokens": Chart("Tokens a step", "padding left out"),
    "nonfinite_steps": Chart("Steps not finite", "so far", smooth=False),
    "rollbacks": Chart("Rollbacks", "so far", smooth=False),
}
"""By key of a training line, in the order of the page; other numbers of a line come after them."""
BESIDE = {"tokens": ("supervised_tokens", "supervised")}
"""Keys that are drawn into another one's chart, with the name of their line."""
NO_CHART = {"supervised_tokens", "eval_supervised_tokens", *(f"memory_{part}" for part in PARTS)}


def write_report(folder: Path, arguments: Optional[BridgeArguments] = None, to: Optional[Path] = None) -> Path:
    """Make the page of a save folder and write it there, or ``to`` a file; returns the file. See collect for the rest.

    Raises ConfigError for a folder that is none of a run, OSError when the file cannot be written.
    """
    path = to or folder / REPORT_FILE
    write_text(path, html_page(collect(folder, arguments)))
    return path


def html_page(report: Report) -> str:
    """The whole page."""
    charts, tables = _charts(report)
    notes = report.sessions[-1].start["notes"] if report.sessions else []
    body = "".join(
        (
            headline.status(report),
            headline.tiles(report),
            sections.section("use", "Use it", sections.use(report)),
            sections.section("curves", "Curves", _figures(report, charts, tables)),
            sections.section("ledger", "Token ledger", sections.ledger(report.ledger)),
            sections.section("speed", "Speed and memory", sections.speed(report)),
            sections.section("memory", "Memory by phase", memory(report.memory)),
            sections.section("layout", "Layout", sections.layout(report)),
            sections.section("happened", "What happened", sections.happened(report)),
            sections.section("arguments", "Arguments", sections.arguments(report.arguments, notes)),
            sections.section("environment", "Environment", sections.environment(report.environment)),
        )
    )
    name = report.folder.name
    return document(
        "primus_bridge.report",
        body,
        {"charts": charts, "tables": tables, "marks": _marks(report)},
        command="primus report",
        title=f"Run report, {name}",
        heading=name,
        lead=headline.lead(report),
        skip=("curves", "the curves") if charts else ("arguments", "the arguments"),
    )


def _charts(report: Report) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the script draws: the charts in their order, each with its lines, and the columns of those lines."""
    tables = {"train": table(report.training), "eval": table(report.evaluations)}
    training, evaluation = report.training.columns, report.evaluations.columns
    found = dict.fromkeys(training, "train")
    found |= {key: "eval" for key in evaluation if key.removeprefix("eval_") not in training}
    charts = []
    for key in sorted(found.keys() - NO_CHART, key=lambda key: (list(CHARTS).index(key) if key in CHARTS else 99, key)):
        lines = [{"table": found[key], "key": key, "name": "evaluation" if found[key] == "eval" else ""}]
        if f"eval_{key}" in evaluation:
            lines[0]["name"] = "training"
            lines.append({"table": "eval", "key": f"eval_{key}", "name": "evaluation"})
        if key in BESIDE and BESIDE[key][0] in found:
            other, name = BESIDE[key]
            lines[0]["name"] = "all"
            lines.append({"table": "train", "key": other, "name": name})
        chart = CHARTS.get(key) or Chart(key.replace("_", " ").capitalize(), zero=False)
        charts.append({"key": key, **asdict(chart), "lines": lines})
    return charts, tables


def _marks(report: Report) -> dict[str, list[int]]:
    """Steps from which the run went on, and at which it was saved."""
    events = [entry for session in report.sessions for entry in (session.start, *session.events)]
    saved = {entry["step"] for entry in events if entry["event"] == "save"}
    saved |= {found.manifest.step for found in report.checkpoints}
    resumed = {step for step in report.begun_at if step}
    return {"resumed": sorted(resumed), "saved": sorted(step for step in saved if step)}


def _figures(report: Report, charts: list[dict[str, Any]], tables: dict[str, Any]) -> str:
    if not charts:
        return '<p class="note">No step was logged.</p>'
    figures = "".join(_figure(f"chart-{index}", text(chart["title"]), chart) for index, chart in enumerate(charts))
    lines = tables["train"]["lines"]
    cut = ""
    if len(tables["train"]["first"]) < lines:
        cut = (
            f'<p class="note" id="buckets">Of {lines:,} log lines the page holds up to {BUCKETS:,} parts of equal '
            "length: the band is their lowest to highest value, the line their mean.</p>"
        )
    smoothing = {"0": "None", "100": "Light", "40": "Medium", "10": "Strong"}
    marks = _marks(report)
    keys_of_marks = "".join(
        f'<li><i class="{css}"></i>{name}</li>'
        for css, name in (("saved", "checkpoint"), ("resumed", "resumed"))
        if marks[css]
    )
    return (
        f'<div class="tools">{switch("smoothing", "Smoothing", smoothing, chosen="40")}'
        f"{switch('axis', 'Axis', {'linear': 'Linear', 'log': 'Log'})}"
        f'<ul class="legend" aria-label="Marks">{keys_of_marks}</ul></div>{cut}'
        '<noscript class="card">The curves are drawn by a script in this page: allow it to run.</noscript>'
        f'<div class="curves">{figures}</div>'
    )


def _figure(name: str, title: str, chart: dict[str, Any]) -> str:
    return (
        f'<figure class="chart" id="{name}"><figcaption><b>{title}</b><span>{text(chart["unit"])}</span>'
        f'<span class="readout"></span></figcaption>'
        f'<div class="plot" tabindex="0" role="group" aria-label="{title}; arrow keys move along the steps"></div>'
        f'<details class="numbers"><summary>Numbers</summary><div class="scroll" tabindex="0" role="group" '
        f'aria-label="Numbers of {title}"></div></details></figure>'
    )
