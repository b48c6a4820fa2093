"""The report below its headline as HTML: commands, ledger, speed, layout, what happened, arguments, environment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from primus_bridge.config import describe, schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.data.ledger import Counts, Ledger, table_rows
from primus_bridge.page.document import switch, text
from primus_bridge.page.visible import visible
from primus_bridge.report.collect import Report
from primus_bridge.report.commands import snippets
from primus_bridge.report.headline import size
from primus_bridge.report.layout import Layout, picture
from primus_bridge.report.series import spread
from primus_bridge.report.tables import table

MOST_EVENTS = 200
"""Rows of the list of what happened; of more it holds the last ones."""


def section(name: str, title: str, body: str) -> str:
    """A part of the page with its heading; "" when there is nothing to show."""
    if not body:
        return ""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{body}</section>'


def use(report: Report) -> str:
    parts = []
    for found in snippets(report):
        title, code = escape(found.title), "\n".join(map(visible, found.code.split("\n")))
        pre = f'<pre tabindex="0" aria-label="{title}, {found.language}">{escape(code)}</pre>'
        parts.append(f'<div class="card snippet"><h3>{title}</h3>{pre}</div>')
    said = ""
    if report.exports:
        said = f'<p class="note">The export is in <code>{text(report.exports[-1])}</code>.</p>'
    elif report.arguments.checkpoint.convert_to_hf and report.outcome == "finished":
        said = '<p class="note">The export was not written yet when this page was.</p>'
    return f'{said}<div class="snippets">{"".join(parts)}</div>' if parts else said


# ---- the token ledger


def ledger(found: Ledger | None) -> str:
    if found is None:
        return ""
    columns = found.columns()
    rows = table_rows([counts for _, counts in columns])
    body = [
        [f'<span class="indent">{text(label.strip())}</span>' if label.startswith(" ") else text(label)]
        + [f"{value:,}" for value in values]
        for label, values in rows
    ]
    sources = "".join(f"<li><b>{text(source.name)}</b> {text(source.says())}</li>" for source in found.sources)
    warnings = "".join(f'<p class="note warn">{text(warning)}</p>' for warning in found.warnings)
    bars = "".join(_bars(name, counts) for name, counts in columns)
    template = f"Template {text(found.template)}, at most {found.seq_length:,} tokens a sample"
    names = [text(name) for name, _ in columns]
    return (
        f'{warnings}<div class="card"><ul class="plain">{sources}<li>{template}; {text(found.batches())}</li></ul>'
        f'{_legend()}<dl class="bars">{bars}</dl>{table(["", *names], body, ("word", ""), "Token ledger")}</div>'
    )


TOKEN_PARTS = {"supervised": "supervised", "masked": "masked", "truncated": "cut off"}
SAMPLE_PARTS = {"kept": "whole", "cut": "truncated", "dropped": "dropped"}


def _legend() -> str:
    def items(parts: dict[str, str]) -> str:
        return "".join(f'<li><i class="{css}"></i>{name}</li>' for css, name in parts.items())

    return (
        f'<div class="keys"><ul class="legend" aria-label="Tokens"><li>Tokens:</li>{items(TOKEN_PARTS)}</ul>'
        f'<ul class="legend" aria-label="Samples"><li>Samples:</li>{items(SAMPLE_PARTS)}</ul></div>'
    )


def _bars(name: str, counts: Counts) -> str:
    tokens = (counts.supervised, counts.masked, counts.truncated_tokens)
    samples = (counts.samples - counts.truncated_samples, counts.truncated_samples, counts.lost)
    return (
        f"<div><dt>{text(name)}</dt><dd>{_bar('Tokens', TOKEN_PARTS, tokens)}"
        f"{_bar('Samples', SAMPLE_PARTS, samples)}</dd></div>"
    )


def _bar(what: str, parts: dict[str, str], values: Sequence[int]) -> str:
    total = sum(values) or 1
    shares = [(css, name, value, 100 * value / total) for (css, name), value in zip(parts.items(), values, strict=True)]
    said = ", ".join(f"{share:.1f} % {name}" for _, name, value, share in shares if value)
    pieces = "".join(
        f'<i class="{css}" style="width:{share:.3f}%" title="{name}: {value:,} ({share:.1f} %)"></i>'
        for css, name, value, share in shares
        if value
    )
    return f'<div class="bar" role="img" aria-label="{what}: {said}">{pieces}</div><span>{said}</span>'


# ---- speed and memory

SPREADS = (
    ("tokens_per_second", "Tokens per second", lambda value: f"{value:,.0f}"),
    ("step_time", "Step time", lambda value: f"{value:.3g} s"),
    ("memory", "Peak memory of rank 0", size),
    ("tokens", "Tokens a step", lambda value: f"{value:,.0f}"),
    ("supervised_tokens", "Supervised tokens a step", lambda value: f"{value:,.0f}"),
)


def speed(report: Report) -> str:
    rows = []
    for key, name, shown in SPREADS:
        found = spread(report.training, key)
        if found is None:
            continue
        rows.append([name, *map(shown, (found.median, found.low, found.high, found.largest))])
        if key == "tokens_per_second" and report.ranks > 1:
            parts = (found.median, found.low, found.high, found.largest)
            rows.append(["Tokens per second and rank", *(shown(value / report.ranks) for value in parts)])
    if not rows:
        return ""
    heads = ["", "median", "5th percentile", "95th percentile", "largest"]
    return f'<div class="card">{table(heads, rows, ("word", ""), "Speed and memory")}</div>'


def layout(report: Report) -> str:
    found = Layout.of(report.arguments.model, report.ranks)
    model = report.arguments.model
    notes = [f"{found.says()} = {report.ranks} rank{'s' * (report.ranks > 1)}"]
    notes += [f"{found.virtual} virtual stages a rank"] if found.virtual > 1 else []
    notes += [f"experts over {found.expert} ranks"] if found.expert > 1 else []
    notes += ["sequence parallel"] if model.sequence_parallel else []
    return f'<div class="card"><p class="note">{", ".join(notes)}</p>{picture(found)}</div>'


# ---- what happened


def happened(report: Report) -> str:
    there = {saved.folder.name: saved for saved in report.checkpoints}
    rows = []
    for session in report.sessions:
        for entry in (session.start, *session.events):
            what, detail = _event(entry, there)
            rows.append([f"{entry['time'][:10]} {entry['time'][11:19]}", what, f"{entry['step']:,}", text(detail)])
    if not rows:
        rows = [
            ["", "checkpoint", f"{saved.manifest.step:,}", text(f"{saved.folder.name}, {size(saved.bytes)}")]
            for saved in report.checkpoints
        ]
    if not rows:
        return ""
    note = f'<p class="note">The last {MOST_EVENTS} of {len(rows):,}.</p>' if len(rows) > MOST_EVENTS else ""
    css = ("word", "word", "", "word wide")
    return (
        f'<div class="card">{note}'
        f"{table(['UTC', 'what', 'step', 'detail'], rows[-MOST_EVENTS:], css, 'What happened')}</div>"
    )


def _event(entry: dict[str, Any], there: dict[str, Any]) -> tuple[str, str]:
    event = entry["event"]
    if event == "start":
        return ("resumed" if entry["step"] else "started"), f"{entry['ranks']} rank{'s' * (entry['ranks'] > 1)}"
    if event == "save":
        name = entry["checkpoint"]
        return "checkpoint", f"{name}, {size(there[name].bytes)}" if name in there else f"{name}, removed since"
    if event == "export":
        return "exported", entry["folder"]
    if event == "rollback":
        return "went back", f"to the checkpoint of step {entry['step']:,}; {entry['reason']}"
    if event == "error":
        return "failed", entry["message"]
    return "ended", entry.get("reason") or ""


# ---- arguments

CHANGED, GIVEN, DEFAULTS = "Changed from the default", "Given, and equal to the default", "Left at the default"


def arguments(found: BridgeArguments, notes: Sequence[str]) -> str:
    """Those that were changed first. notes: what the run said of keys that change nothing."""
    usual = BridgeArguments()
    groups: dict[str, list[str]] = {CHANGED: [], GIVEN: [], DEFAULTS: []}
    for name, value, source in describe(found):
        default = schema.get(usual, name)
        given = source != "default"
        changed = given and value != default  # a stage has a default of its own in each dialect
        group = CHANGED if changed else GIVEN if given else DEFAULTS
        was = f'<span class="was">default {text(_shown(default))}</span>' if changed else ""
        groups[group].append(
            f'<tr><th scope="row">{name}</th><td class="value">{text(_shown(value))}{was}</td>'
            f'<td class="source">{text(source)}</td></tr>'
        )
    bodies = "".join(
        f'<tbody{" class=usual" * (title == DEFAULTS)}><tr class="group">'
        f'<th colspan="3" scope="rowgroup">{title} ({len(rows)})</th></tr>'
        f"{''.join(rows)}</tbody>"
        for title, rows in groups.items()
        if rows
    )
    which = switch("which", "Show", {"given": "Given", "all": "All"})
    said = "".join(f'<p class="note">{text(note)}</p>' for note in notes)
    return (
        '<div class="find"><label>Search <input id="search" type="search" autocomplete="off" spellcheck="false" '
        f'placeholder="lr, parallel, run.yaml ..."></label>{which}<output id="found" for="search"></output></div>'
        f'{said}<div class="card"><table class="arguments" id="arguments-table"><thead><tr>'
        '<th scope="col">argument</th><th scope="col">value</th><th scope="col">from</th></tr></thead>'
        f"{bodies}</table></div>"
    )


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else schema.shown(value)


# ---- environment


def environment(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    devices = found["devices"]
    rows = [
        ("primus-bridge", found["primus_bridge"]),
        ("Python", found["python"]),
        ("System", found["system"]),
        ("CPU cores", devices["cpu_cores"]),
        ("GPU runtime of torch", devices["runtime"]),
        *((f"GPU {index}", gpu) for index, gpu in enumerate(devices["gpus"])),
    ]
    packages = [(name, version or "missing") for name, version in found["packages"].items()]
    optional = [
        (part["name"], part["version"] or ("found" if part["found"] else "missing")) for part in found["optional"]
    ]
    patches = [
        (patch["id"], f"{patch['package']} {patch['installed']}", patch["reason"])
        for patch in found["patches"]
        if patch["active"]
    ]

    def part(title: str, heads: Sequence[str], values: Iterable[Sequence[Any]]) -> str:
        rows = [[text(cell) for cell in row] for row in values]
        return f'<div class="card named"><h3>{title}</h3>{table(heads, rows, ("word",), title)}</div>' if rows else ""

    return (
        '<p class="note">As rank 0 saw it when the run was last started.</p><div class="cards">'
        + part("Machine", ("", ""), rows)
        + part("Optional parts", ("part", "version"), optional)
        + part("Packages", ("package", "version"), packages)
        + "</div>"
        + part("Active patches", ("patch", "of", "because"), patches)
    )
