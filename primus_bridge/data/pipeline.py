"""Pipeline: what a configuration makes of its sources: opened, recognised, with one template and one tokenizer."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.data.formats import Format, open_format, recognise
from primus_bridge.data.ledger import Counts, Ledger, Sequences, SourceLedger
from primus_bridge.data.mixture import SourceSpec, train_sources, validation_sources
from primus_bridge.data.prepare import Preparation
from primus_bridge.data.sources import Row, Source
from primus_bridge.data.templates import Template, choose_template
from primus_bridge.data.tokenize import Encoder
from primus_bridge.data.writer import SplitWriter
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CACHE_VERSION = 4
"""Raised when the same rows and options give other tokens than before."""

FIRST_ROWS = 8
"""Rows that dataset_format 'auto' looks at."""

LOST_WARNING = 0.05
"""Part of the rows from which on a loss is a warning."""


@dataclass
class Opened:
    """A source, opened; its format is recognised when it is first asked for."""

    spec: SourceSpec
    source: Source
    split: str
    """train or validation: what its rows are for."""
    stage: str

    @cached_property
    def seen(self) -> tuple[str, str]:
        """(format, how it was chosen)"""
        first = list(islice(iter(self.source), FIRST_ROWS))
        if not first:
            raise ConfigError("the data set is empty: it has no rows", where=self.spec.path)
        return recognise(first, self.spec.dataset_format, self.stage, self.spec.columns)

    @cached_property
    def format(self) -> Format:
        return open_format(self.seen[0], self.spec)

    @property
    def rows(self) -> Iterable[Row]:
        """What the format reads one by one: the source's rows, or for flat OASST a row a tree."""
        if not self.gathers:
            return self.source
        whole = copy.copy(self.source)
        whole.max_samples = None  # it counts what the format makes of the rows
        return islice(self.format.gather(whole), self.spec.max_samples)

    def number_of_rows(self) -> int | None:
        """How many ``rows`` gives, where that is known before they are read."""
        return None if self.gathers or self.source.streaming else len(self.source)

    def counted_rows(self) -> Sequence[Row] | Source:
        """The same, with a length."""
        return list(self.rows) if self.gathers else self.source

    @property
    def gathers(self) -> bool:
        """Whether a row of ``rows`` is made of several of the source's."""
        return type(self.format).gather is not Format.gather


def open_sources(arguments: BridgeArguments) -> list[Opened]:
    """Every source of the run; training ones first. Raises ConfigError when one is not there."""
    dataset = arguments.dataset
    return [
        Opened(
            spec,
            Source(
                spec.path,
                split=spec.split,
                max_samples=spec.max_samples,
                streaming=dataset.streaming and split == "train",
                key=spec.key,
            ),
            split,
            arguments.stage,
        )
        for split, specs in (("train", train_sources(dataset)), ("validation", validation_sources(dataset)))
        for spec in specs
    ]


class Pipeline:
    """The configuration's sources, its template, and how rows become samples. Opening raises for a missing file."""

    def __init__(self, arguments: BridgeArguments, tokenizer: PreTrainedTokenizerFast):
        if arguments.model.seq_length < 2:
            raise ConfigError(f"model.seq_length must be at least 2, got {arguments.model.seq_length}")
        self.arguments, self.tokenizer = arguments, tokenizer
        self.sources = open_sources(arguments)

    @property
    def pretrain(self) -> bool:
        return self.arguments.stage == "pretrain"

    @property
    def num_workers(self) -> int:
        """Processes that tokenise; by default one for every four cores, whose tokenizer has threads of its own."""
        asked = self.arguments.dataset.num_workers
        return asked if asked is not None else min(8, max(1, (os.cpu_count() or 1) // 4))

    @cached_property
    def template(self) -> Template | None:
        """One for all sources; None for plain documents.

        Raises ConfigError when 'auto' would take another for one source than for another.
        """
        if self.pretrain:
            return None
        dataset = self.arguments.dataset
        chosen = {
            opened.spec.name: choose_template(dataset, opened.format.name, self.tokenizer) for opened in self.sources
        }
        names = {template.name for template in chosen.values()}
        if len(names) > 1:
            each = ", ".join(f"{name}: {template.name}" for name, template in chosen.items())
            raise ConfigError(
                f"the sources' formats have different templates ({each}), and a model is trained on one: "
                "set dataset.prompt_template"
            )
        return next(iter(chosen.values()))

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.template.control_tokens() if self.template else ())

    def preparation(self, source: int) -> Preparation:
        """How the rows of the source of this index become samples."""
        dataset = self.arguments.dataset
        return Preparation(
            source,
            self.sources[source].format,
            self.template,
            self.encoder,
            self.arguments.model.seq_length,
            dataset.truncation,
            dataset.loss_on,
            dataset.prompt_loss_weight,
            dataset.bad_rows,
        )

    def writer(self, folder: Path, split: str) -> SplitWriter:
        """A writer for the samples of a split."""
        block = self.arguments.model.seq_length if self.pretrain else None
        apart = self.arguments.dataset.packed_sequence
        return SplitWriter(folder, split, self.encoder.unknown_id, block, apart)

    def ledger(self, which: Iterable[int] | None = None) -> Ledger:
        """The ledger before anything is counted, of the sources of these indices; None: of all."""
        dataset, template = self.arguments.dataset, self.template
        ledger = Ledger(
            template=template.name if template else "none (next-token loss on all text)",
            seq_length=self.arguments.model.seq_length,
            streaming=dataset.streaming,
            warnings=template.warnings() if template else [],
            sequences=Sequences(packed=dataset.packed_sequence),
        )
        for opened in self.sources if which is None else [self.sources[number] for number in which]:
            splits = ["train", "validation"] if dataset.validation_split else [opened.split]
            counts = {split: Counts() for split in splits}
            ledger.sources.append(
                SourceLedger(opened.spec.name, opened.split, *opened.seen, opened.spec.weight, counts)
            )
        if "preference" in {opened.format.name for opened in self.sources} and not self.pretrain:
            ledger.warnings.append("preference rows: the chosen answers are trained on, the rejected ones are not used")
        return ledger

    def check_left(self, ledger: Ledger, split: str) -> None:
        """Raises ConfigError when nothing is left of a split, or more than max_dropped_fraction is lost."""
        counts, where = ledger.counts(split), self._where(split)
        if not counts.rows:
            raise ConfigError("the data set is empty: it has no rows", where=where)
        if not counts.samples:
            raise ConfigError(_nothing_left(split, counts, self.arguments), where=where)
        self.check_lost(ledger, split)

    def _where(self, split: str) -> str:
        """The paths of the sources that give rows to a split."""
        given = "train" if self.arguments.dataset.validation_split else split
        return ", ".join(opened.spec.path for opened in self.sources if opened.split == given)

    def check_lost(self, ledger: Ledger, split: str) -> None:
        """Raises ConfigError when more than max_dropped_fraction of a split is lost; a smaller loss is a warning."""
        counts, where = ledger.counts(split), self._where(split)
        # documents make no samples of their own: blocks hold several
        what, total = ("documents", counts.rows) if self.pretrain else ("samples", counts.samples + counts.lost)
        if not total:
            return
        limit, lost = self.arguments.dataset.max_dropped_fraction, counts.lost / total
        told = f"{counts.lost:,} of {total:,} {split} {what} are lost ({counts.why_dropped()})"
        if lost > limit:
            raise ConfigError(
                f"{told}, more than max_dropped_fraction {limit:g}: {_mend(counts, self.arguments)}, "
                "or raise dataset.max_dropped_fraction",
                where=where,
            )
        before = f" {split} {what} are lost ("
        ledger.warnings = [warning for warning in ledger.warnings if before not in warning]
        if lost > LOST_WARNING:
            ledger.warnings.append(told)


def identity(
    arguments: BridgeArguments, tokenizer: PreTrainedTokenizerFast, sources: Sequence[Opened], exact: bool = True
) -> str:
    """sha256 of everything the tokens depend on: content of the data, the tokenizer, and the options.

    exact: False takes names and sizes for the content of files, which are the same where they were copied to.
    """
    import jinja2
    import tokenizers
    import transformers

    data = asdict(arguments.dataset)
    # where the data lies, and how it is batched, change no token; the sources stand below, as they were resolved
    for name in ("data_path", "sources", "validation_data_path", "pad_to", "shuffle", "num_workers"):
        del data[name]
    by_seed = arguments.dataset.validation_split or any(opened.spec.weight % 1 for opened in sources)
    what = {
        "version": CACHE_VERSION,
        "libraries": [tokenizers.__version__, transformers.__version__, jinja2.__version__],
        "sources": [_source_identity(opened, exact) for opened in sources],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "custom_template": _content(arguments.dataset.custom_template),
        "prompt_template": _content(arguments.dataset.prompt_template),
        "adds_bos": list(tokenizer("a").input_ids),
        "options": data,
        "seq_length": arguments.model.seq_length,
        "stage": arguments.stage,
        "seed": arguments.rng.seed if by_seed else None,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _source_identity(opened: Opened, exact: bool) -> list[Any]:
    spec = asdict(opened.spec)
    for name in ("path", "key", "name"):
        del spec[name]
    code = open_format("custom", opened.spec).fingerprint() if opened.spec.format_function else ""
    files = [f"{path.name}:{path.stat().st_size}" for path in opened.source.files]
    return [opened.split, opened.source.fingerprint() if exact or not files else files, spec, code]


def _content(path: str | None) -> str | None:
    """The text of a file, or what was given when it is none."""
    if path is None or "\n" in path or not os.path.isfile(os.path.expanduser(path)):
        return path
    return Path(path).expanduser().read_text(encoding="utf-8", errors="replace")


def _nothing_left(split: str, counts: Counts, arguments: BridgeArguments) -> str:
    return (
        f"the {split} set is empty: of {counts.rows:,} rows none is left ({counts.why_dropped()}); "
        f"{_mend(counts, arguments)}"
    )


def _mend(counts: Counts, arguments: BridgeArguments) -> str:
    worst = max(counts.dropped, key=lambda reason: counts.dropped[reason])
    if worst in ("too_long", "cut_away"):
        option = {"drop": "left", "left": "right", "right": "left"}[arguments.dataset.truncation]
        return f"raise model.seq_length (now {arguments.model.seq_length}) or set dataset.truncation: {option}"
    if worst == "filtered":
        return "check dataset.languages and dataset.include_unreviewed"
    if worst in ("bad_row", "no_answer", "empty"):
        return "check the rows, dataset.dataset_format and dataset.columns"
    return "every token is masked: check the answers, dataset.loss_on and dataset.prompt_template"
