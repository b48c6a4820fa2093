"""The token ledger: what became of every row and every token, per source and split. Nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

DROPPED_REASONS = {
    "too_long": "longer than seq_length",
    "cut_away": "nothing supervised within seq_length",
    "no_supervised": "no supervised token",
    "no_answer": "no answer",
    "filtered": "filtered out",
    "bad_row": "not readable as the format",
    "empty": "empty text",
}


@dataclass
class Counts:
    """Counts of one source's part of a split. Always: tokens == supervised + masked."""

    rows: int = 0
    """Rows read from the source (pretrain: documents; flat OASST: trees)."""
    samples: int = 0
    """Samples to train on (pretrain: blocks of seq_length + 1 tokens)."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Samples left out, by reason (DROPPED_REASONS)."""
    truncated_samples: int = 0
    """Samples cut to fit seq_length."""
    truncated_tokens: int = 0
    """Tokens cut from them."""
    truncated_turns: int = 0
    """Whole turns among what was cut."""
    skipped_turns: int = 0
    """Turns left out: before the first human turn, after the last answer, or of an OASST tree (deleted, unreviewed)."""
    merged_turns: int = 0
    """Turns joined to the one before, of the same role, for a template whose roles alternate."""
    tokens: int = 0
    """Of all samples; neighbouring blocks of pretraining share one token, which counts in both."""
    supervised: int = 0
    """Tokens that are predicted with a loss."""
    masked: int = 0
    unknown_tokens: int = 0
    """Tokens that are the tokenizer's unknown token: text it cannot spell."""

    def drop(self, reason: str) -> None:
        """Count one sample left out."""
        assert reason in DROPPED_REASONS, reason
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    @property
    def lost(self) -> int:
        """Samples left out, whatever the reason."""
        return sum(self.dropped.values())

    def add(self, other: Counts) -> None:
        """Adds the counts of ``other`` to these."""
        for item in fields(self):
            if item.name != "dropped":
                setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def why_dropped(self) -> str:
        """``3 longer than seq_length, 1 no supervised token``; empty when nothing was dropped."""
        return ", ".join(f"{self.dropped[r]:,} {text}" for r, text in DROPPED_REASONS.items() if self.dropped.get(r))


@dataclass
class SourceLedger:
    """One source: what it is, and its counts per split (train, validation)."""

    name: str
    split: str
    """train, validation: which split's rows it gives; with validation_split both come from one source."""
    format: str
    """The format used."""
    format_seen: str
    """How it was chosen: asked for, or what the first rows looked like."""
    weight: float = 1.0
    """How often each sample comes in an epoch."""
    counts: dict[str, Counts] = field(default_factory=dict)
    """By split."""

    def says(self) -> str:
        """``format alpaca (asked for), weight 2``."""
        weight = f", weight {self.weight:g}" if self.weight != 1.0 else ""
        return f"format {self.format} ({self.format_seen}){weight}"


@dataclass
class Sequences:
    """How the training samples lie in the sequences of one epoch."""

    count: int = 0
    packed: bool = False
    inputs: int = 0
    """Places that tokens take."""
    places: int = 0
    """All places, padding included; 0: not known before the layout is."""

    @property
    def padding(self) -> int:
        return self.places - self.inputs if self.places else 0

    @property
    def efficiency(self) -> float:
        """Tokens over places, 0..1."""
        return self.inputs / self.places if self.places else 0.0


@dataclass
class Ledger:
    """The ledger of a run: its sources with their counts, the template, and the sequences of an epoch."""

    template: str = ""
    seq_length: int = 0
    sources: list[SourceLedger] = field(default_factory=list)
    sequences: Sequences = field(default_factory=Sequences)
    """Of the training samples."""
    streaming: bool = False
    """True: the counts are of what has been read so far."""
    warnings: list[str] = field(default_factory=list)

    def counts(self, split: str) -> Counts:
        """The sums over all sources."""
        total = Counts()
        for source in self.sources:
            if split in source.counts:
                total.add(source.counts[split])
        return total

    @property
    def train(self) -> Counts:
        return self.counts("train")

    @property
    def validation(self) -> Counts | None:
        return self.counts("validation") if "validation" in self.splits else None

    @property
    def splits(self) -> list[str]:
        """train, and validation when there is one."""
        found = {split for source in self.sources for split in source.counts}
        return [split for split in ("train", "validation") if split in found]

    def add(self, other: Ledger) -> None:
        """Adds what another window of the same stream counted."""
        for mine, theirs in zip(self.sources, other.sources, strict=False):  # training sources come first
            for split, counts in theirs.counts.items():
                mine.counts.setdefault(split, Counts()).add(counts)
        self.sequences.count += other.sequences.count
        self.sequences.inputs += other.sequences.inputs
        self.sequences.places += other.sequences.places

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts for JSON, with the sums over the sources as ``totals``."""
        values = asdict(self)
        values["totals"] = {split: asdict(self.counts(split)) for split in self.splits}
        values["sequences"] |= {"padding": self.sequences.padding, "efficiency": self.sequences.efficiency}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ledger:
        """The inverse of to_dict."""
        values = {name: value for name, value in values.items() if name != "totals"}
        values["sources"] = [
            SourceLedger(**source | {"counts": {split: Counts(**c) for split, c in source["counts"].items()}})
            for source in values["sources"]
        ]
        numbers = values["sequences"]
        values["sequences"] = Sequences(**{item.name: numbers[item.name] for item in fields(Sequences)})
        return cls(**values)

    def lines(self) -> list[str]:
        """The ledger as text: the sources, a table with a column a source and split, the sequences, warnings."""
        out = [_source_line(source) for source in self.sources]
        out.append(f"template  {self.template}, at most {self.seq_length:,} tokens a sample")
        out += _text_table(self.columns())
        out.append(f"batches   {self.batches()}")
        return out + [f"warning: {warning}" for warning in self.warnings]

    def batches(self) -> str:
        """``1,234 packed sequences of 2,048 an epoch: ...``, with the padding once the layout is known."""
        sequences = self.sequences
        kind = f"packed sequences of {self.seq_length:,}" if sequences.packed else "sequences"
        line = f"{sequences.count:,} {kind} {'so far' if self.streaming else 'an epoch'}"
        if sequences.places:
            line += (
                f": {sequences.padding:,} of {sequences.places:,} places are padding ({sequences.efficiency:.2%} full)"
            )
        return line

    def columns(self) -> list[tuple[str, Counts]]:
        """A table's columns: of several sources each one's training part, then the sums of each split."""
        several = len([source for source in self.sources if "train" in source.counts]) > 1
        columns = []
        for split in self.splits:
            if several and split == "train":
                columns += [(source.name, source.counts[split]) for source in self.sources if split in source.counts]
            columns.append((split, self.counts(split)))
        return columns


def _source_line(source: SourceLedger) -> str:
    label = "data" if "train" in source.counts else "held out"
    return f"{label:<10}{source.name}: {source.says()}"


def table_rows(counts: Sequence[Counts]) -> list[tuple[str, list[int]]]:
    """A table's rows: label and a number a column. What is 0 in every column is left out, but for the main rows."""
    rows: list[tuple[str, list[int]]] = []

    def row(label: str, values: Iterable[int], always: bool = False) -> None:
        values = list(values)
        if always or any(values):
            rows.append((label, values))

    row("rows read", (c.rows for c in counts), always=True)
    row("samples", (c.samples for c in counts), always=True)
    for reason, text in DROPPED_REASONS.items():
        row(f"dropped: {text}", (c.dropped.get(reason, 0) for c in counts))
    for name in ("truncated_samples", "truncated_tokens", "truncated_turns", "skipped_turns", "merged_turns"):
        row(name.replace("_", " "), (getattr(c, name) for c in counts))
    row("tokens", (c.tokens for c in counts), always=True)
    row("  supervised", (c.supervised for c in counts), always=True)
    row("  masked", (c.masked for c in counts), always=True)
    row("unknown tokens", (c.unknown_tokens for c in counts))
    return rows


def _text_table(columns: list[tuple[str, Counts]]) -> list[str]:
    rows = table_rows([count for _, count in columns])
    label_width = max(22, max(len(label) for label, _ in rows) + 2)
    widths = [max(14, len(name) + 2) for name, _ in columns]
    heads = " " * label_width + "".join(f"{name:>{width}}" for (name, _), width in zip(columns, widths, strict=True))
    return [heads] + [
        f"{label:<{label_width}}" + "".join(f"{value:>{width},}" for value, width in zip(values, widths, strict=True))
        for label, values in rows
    ]
