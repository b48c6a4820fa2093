"""A preview as one HTML page: nothing is loaded from elsewhere, and nothing in the data can run."""

from __future__ import annotations

from html import escape
from typing import Any

from primus_bridge.data.inspect import InspectedSequence
from primus_bridge.page.document import document, facts, switch
from primus_bridge.page.visible import one_line, visible
from primus_bridge.preview.histogram import histogram
from primus_bridge.preview.report import Preview, TokenCounts

MOST_TOKENS = 20_000
"""Tokens of a sequence that the page holds."""
MOST_TOKENS_OF_ALL = 200_000
LEAST_TOKENS = 500
"""Of each sequence, however many there are."""

LEGENDS = {
    "mask": {"supervised": "sup", "weight below 1": "part", "masked": "card"},
    "turn": {role: role for role in ("system", "user", "assistant", "tool")} | {"template": "card"},
    "segment": {f"segment {i}": f"g{i}" for i in range(6)},
}


def html_page(preview: Preview) -> str:
    """The whole page. Of very long sequences it holds the first tokens, and says so."""
    most = max(LEAST_TOKENS, min(MOST_TOKENS, MOST_TOKENS_OF_ALL // max(1, len(preview.sequences))))
    cards = "".join(_card(number, sequence, preview, most) for number, sequence in enumerate(preview.sequences))
    body = f"""{_facts(preview)}
<section aria-labelledby="lengths-title">
<h2 id="lengths-title">Lengths</h2>
<div class="charts">{_charts(preview)}</div>
</section>
<section aria-labelledby="sequences-title">
<h2 id="sequences-title">Sequences</h2>
<div class="tools">
{switch("colour", "Colour by", {"mask": "Loss mask", "turn": "Turn", "segment": "Segment"})}
{switch("view", "View", {"text": "Text", "table": "Table"})}
{_legends()}
</div>
<noscript class="card">The tokens are drawn by a script in this page: allow it to run.</noscript>
<div class="split">
<div id="sequences" class="sequences">{cards}</div>
<aside id="details" class="card details" aria-label="Token" aria-live="polite">
<h3>Token <button class="button close" type="button" aria-label="Close">Close</button></h3>
<div class="body"><p class="hint">Point at a token, click it, or move with the arrow keys.</p></div>
</aside>
</div>
</section>
<section aria-labelledby="ledger-title">
<h2 id="ledger-title">Token ledger</h2>
<div class="card"><pre tabindex="0">{escape(chr(10).join(map(one_line, preview.ledger)))}</pre></div>
</section>"""
    return document(
        "primus_bridge.preview",
        body,
        _data(preview, most),
        command="primus preview",
        title=f"Data preview, {preview.split}: {preview.template}",
        heading="What the model trains on",
        lead=f"{preview.title().capitalize()}, as they enter the model.",
        skip=("sequences-title", "the sequences"),
        root={"data-colour": "mask", "data-view": "text"},
    )


def _facts(preview: Preview) -> str:
    tokens, supervised = int(preview.lengths.sum()), int(preview.supervised.sum())
    rows = {
        "Samples": f"{len(preview.lengths):,}",
        "Tokens": f"{tokens:,}",
        "Supervised": f"{supervised:,} ({100 * supervised / max(1, tokens):.1f}\u00a0%)",
        "Sequence length": f"{preview.seq_length:,}",
        "Format": preview.format,
        "Template": preview.template,
        "Tokenizer": preview.tokenizer,
    }
    if preview.fill is not None and len(preview.fill):
        rows["Packs filled"] = f"{100 * float(preview.fill.mean()):.2f} %"
    return facts(rows)


def _charts(preview: Preview) -> str:
    charts = [
        histogram(preview.lengths, "Tokens a sample", "tokens"),
        histogram(preview.supervised, "Supervised tokens a sample", "supervised tokens"),
    ]
    if preview.fill is not None:
        charts.append(histogram(preview.fill, "Fill of packs", "used part of seq_length", percent=True))
    return "".join(charts)


def _legends() -> str:
    out = []
    for name, entries in LEGENDS.items():
        items = "".join(
            f'<li><i style="background:var(--{colour});border:1px solid var(--line)"></i>{text}</li>'
            for text, colour in entries.items()
        )
        out.append(f'<ul class="legend {name}" aria-label="Colours">{items}</ul>')
    return "".join(out)


def _card(number: int, sequence: InspectedSequence, preview: Preview, most: int) -> str:
    counts = TokenCounts.of(sequence, preview)
    share = 100 * counts.supervised / max(1, counts.tokens)
    rows = {
        "tokens": f"{counts.tokens:,}",
        "supervised": f"{counts.supervised:,} ({share:.0f}\u00a0%)",
        "masked": f"{counts.masked:,}",
        "segments": f"{counts.segments:,}",
    }
    if counts.padding is not None:
        rows["padding"] = f"{counts.padding:,}"
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows.items())
    cut = ""
    if counts.tokens > most:
        cut = (
            f'<div class="foot cut">The page holds the first {most:,} of {counts.tokens:,} tokens of this sequence; '
            "primus preview --json holds all.</div>"
        )
    columns = "".join(
        f'<th scope="col"{css}>{name}</th>'
        for name, css in {
            "#": "",
            "id": "",
            "text": ' class="piece"',
            "weight": "",
            "role": ' class="word"',
            "turn": "",
            "segment": "",
            "position": "",
        }.items()
    )
    return f"""<article class="card" id="sequence-{number}" aria-labelledby="sequence-{number}-title">
<div class="head"><h3 id="sequence-{number}-title">Sequence {number}</h3><dl>{cells}</dl></div>
<div class="meter" role="img" aria-label="{share:.0f} % supervised"><i style="width:{share:.2f}%"></i></div>
<div class="text-view"></div>
<div class="grid-view" tabindex="0" aria-label="Tokens of sequence {number} as a table">
<table><thead><tr>{columns}</tr></thead><tbody></tbody></table></div>
<div class="foot more"></div>{cut}
</article>"""


def _data(preview: Preview, most: int) -> dict[str, Any]:
    """The tokens, as the script reads them."""
    roles = sorted({role for sequence in preview.sequences for role in sequence.roles})
    index = {role: i for i, role in enumerate(roles)}

    def columns(sequence: InspectedSequence) -> dict[str, Any]:
        return {
            "ids": sequence.ids[:most],
            "weights": sequence.loss_weights[:most],
            "positions": sequence.position_ids[:most],
            "segments": sequence.segments[:most],
            "turns": sequence.turns[:most],
            "roles": [index[role] for role in sequence.roles[:most]],
            "shown": [visible(piece) for piece in sequence.pieces[:most]],
            "sources": [one_line(source) for source in sequence.sources],
        }

    return {
        "special": sorted(preview.special_ids),
        "roles": roles,
        "sequences": [columns(sequence) for sequence in preview.sequences],
    }
