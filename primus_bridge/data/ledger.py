"""The token ledger: what became of every row and every token, per split. Nothing is dropped in silence."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

DROPPED_REASONS = {
    "too_long": "longer than seq_length",
    "no_supervised": "no supervised token",
    "empty": "empty text",
}


@dataclass
class SplitLedger:
    """Counts of one split. Always: tokens == supervised + masked; and for SFT: rows == samples + dropped."""

    rows: int = 0
    """Rows read from the source (pretrain: documents)."""
    samples: int = 0
    """Sequences to train on (pretrain: blocks of seq_length + 1 tokens)."""
    dropped_too_long: int = 0
    """Rows left out: longer than seq_length (truncation: drop), or the last answer alone is (truncation: left)."""
    dropped_no_supervised: int = 0
    """Rows left out: no token to learn from remained."""
    dropped_empty: int = 0
    """Documents left out: empty text."""
    truncated_samples: int = 0
    """Samples cut from the left to fit seq_length."""
    truncated_tokens: int = 0
    """Tokens cut from them."""
    skipped_turns: int = 0
    """Turns left out: before the first human turn, or after the last answer."""
    tokens: int = 0
    supervised: int = 0
    """Tokens that are predicted with a loss."""
    masked: int = 0
    unknown_tokens: int = 0
    """Tokens that are the tokenizer's unknown token: text it cannot spell."""

    @property
    def dropped(self) -> int:
        return self.dropped_too_long + self.dropped_no_supervised + self.dropped_empty

    def add(self, other: SplitLedger) -> None:
        """Adds the counts of ``other`` to these."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def why_dropped(self) -> str:
        """``3 longer than seq_length, 1 no supervised token``; empty when nothing was dropped."""
        counts = ((getattr(self, f"dropped_{reason}"), text) for reason, text in DROPPED_REASONS.items())
        return ", ".join(f"{count:,} {text}" for count, text in counts if count)


@dataclass
class Ledger:
    """The ledger of a run: its data's format and template as recognised, and the counts per split."""

    source: str = ""
    format: str = ""
    """The format used."""
    format_seen: str = ""
    """How it was chosen: asked for, or what the first rows looked like."""
    template: str = ""
    seq_length: int = 0
    train: SplitLedger = field(default_factory=SplitLedger)
    validation: SplitLedger | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ledger:
        """The inverse of to_dict."""
        values = dict(values)
        values["train"] = SplitLedger(**values["train"])
        if values["validation"] is not None:
            values["validation"] = SplitLedger(**values["validation"])
        return cls(**values)

    def lines(self) -> list[str]:
        """The ledger as lines of text: a table with a column a split, then the warnings."""
        splits = {"train": self.train}
        if self.validation is not None:
            splits["validation"] = self.validation
        out = [
            f"data      {self.source}",
            f"format    {self.format} ({self.format_seen})",
            f"template  {self.template}, at most {self.seq_length:,} tokens",
            " " * 22 + "".join(f"{name:>16}" for name in splits),
        ]
        for label, name in (
            ("rows read", "rows"),
            ("samples", "samples"),
            ("dropped: too long", "dropped_too_long"),
            ("dropped: no target", "dropped_no_supervised"),
            ("dropped: empty", "dropped_empty"),
            ("truncated samples", "truncated_samples"),
            ("truncated tokens", "truncated_tokens"),
            ("skipped turns", "skipped_turns"),
            ("tokens", "tokens"),
            ("  supervised", "supervised"),
            ("  masked", "masked"),
            ("unknown tokens", "unknown_tokens"),
        ):
            values = [getattr(split, name) for split in splits.values()]
            if any(values) or name in ("samples", "supervised", "masked"):
                out.append(f"{label:<22}" + "".join(f"{value:>16,}" for value in values))
        return out + [f"warning: {warning}" for warning in self.warnings]
