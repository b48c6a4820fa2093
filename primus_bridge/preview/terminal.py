"""A preview on a terminal: tokens coloured by loss weight; without colour, what is supervised is in brackets."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from primus_bridge.data.inspect import InspectedSequence
from primus_bridge.page.visible import one_line, visible
from primus_bridge.preview.report import Preview, TokenCounts

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_TOKENS = 4096
"""Tokens of a sequence that are shown; the rest is counted."""

OPEN, CLOSE = "\u27e6", "\u27e7"
SUPERVISED, PARTIAL, MASKED = "bold green", "green", "dim"
SPECIAL = {SUPERVISED: "bold black on green", PARTIAL: "black on green", MASKED: "cyan"}


def show(preview: Preview) -> None:
    """Print every sequence, then the ledger with format and template."""
    from rich.console import Console

    if sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # the text is data: rich reads no markup, emoji names or numbers in it
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    write = _Writer(console, coloured)
    write.line(preview.title(), "bold")
    write.legend()
    for number, sequence in enumerate(preview.sequences):
        write.sequence(number, sequence, preview)
    write.line()
    for line in preview.ledger:
        write.line(visible(line))


class _Writer:
    """The console, and whether weights are shown by colour or by brackets."""

    def __init__(self, console: Console, coloured: bool):
        self.console, self.coloured = console, coloured

    def line(self, text: str = "", style: str = "") -> None:
        self.console.print(text, style=style if self.coloured else "")

    def legend(self) -> None:
        from rich.text import Text

        if not self.coloured:
            self.line(f"{OPEN}supervised{CLOSE}  {OPEN}0.5:supervised with this weight{CLOSE}  masked")
            return
        legend = Text()
        for text, style in (
            ("supervised", SUPERVISED),
            ("weight below 1", PARTIAL),
            ("masked", MASKED),
            ("special, supervised", SPECIAL[SUPERVISED]),
            ("special, masked", SPECIAL[MASKED]),
        ):
            legend.append(text, style).append("  ")
        self.console.print(legend)

    def sequence(self, number: int, sequence: InspectedSequence, preview: Preview) -> None:
        from rich.text import Text

        counts = TokenCounts.of(sequence, preview)
        self.line()
        self.line(f"sequence {number}: {facts(counts)}", "bold")
        tokens = Counter(sequence.segments)
        supervised = Counter(s for s, weight in zip(sequence.segments, sequence.loss_weights, strict=True) if weight)
        shown = min(counts.tokens, SHOWN_TOKENS)
        for segment, indices in groupby(range(shown), key=sequence.segments.__getitem__):
            source = one_line(sequence.sources[segment])
            words = f"{source}, {_many(tokens[segment], 'token')}, {supervised[segment]:,} supervised"
            self.line(f"-- segment {segment}: {words}", "bold cyan")
            text = Text()
            for part, style in self._parts(sequence, indices, preview.special_ids):
                text.append(part, style)
            self.console.print(text, end="" if text.plain.endswith("\n") else "\n")
        if shown < counts.tokens:
            self.line(f"... {counts.tokens - shown:,} more tokens; --json and --html have them", "bold yellow")

    def _parts(
        self, sequence: InspectedSequence, indices: Iterable[int], special_ids: frozenset[int]
    ) -> Iterator[tuple[str, str]]:
        """(text, style) of neighbouring tokens of the same weight and kind; without colour, with brackets."""

        def kind(i: int) -> tuple[float, bool]:
            return sequence.loss_weights[i], self.coloured and sequence.ids[i] in special_ids

        for (weight, special), run in groupby(indices, key=kind):
            text = visible("".join(sequence.pieces[i] for i in run))
            if self.coloured:
                style = MASKED if weight == 0 else SUPERVISED if weight >= 1 else PARTIAL
                yield text, SPECIAL[style] if special else style
            elif weight == 0:
                yield text, ""
            else:
                yield f"{OPEN}{'' if weight == 1 else f'{weight:g}:'}{text}{CLOSE}", ""


def facts(counts: TokenCounts) -> str:
    """``512 tokens, 120 supervised (23 %), 392 masked, 3 segments``; of a pack its padding."""
    share = 100 * counts.supervised / counts.tokens if counts.tokens else 0
    parts = [
        _many(counts.tokens, "token"),
        f"{counts.supervised:,} supervised ({share:.0f} %)",
        f"{counts.masked:,} masked",
        _many(counts.segments, "segment"),
    ]
    if counts.padding is not None:
        parts.append(f"{counts.padding:,} padding")
    return ", ".join(parts)


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
