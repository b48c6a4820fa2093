"""The tokenised data set: built once a node, cached by content, memory-mapped by every rank, without any collective."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.data.cache import cached_folder
from primus_bridge.data.formats import recognise
from primus_bridge.data.ledger import Ledger, SplitLedger
from primus_bridge.data.prepare import Preparation, SplitWriter, prepared_chunks
from primus_bridge.data.sources import Source
from primus_bridge.data.store import DatasetWriter, TokenizedDataset
from primus_bridge.data.templates import choose_template
from primus_bridge.data.tokenize import Encoder
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CACHE_VERSION = 2
"""Raised when the same rows and options give other tokens than before."""

FIRST_ROWS = 8
"""Rows that dataset_format 'auto' looks at."""


@dataclass
class DataBundle:
    train: TokenizedDataset
    validation: TokenizedDataset | None
    ledger: Ledger
    largest_id: int


def check_vocabulary(data: DataBundle, tokenizer: PreTrainedTokenizerFast, vocab_size: int, where: str) -> None:
    """Raises ConfigError when the data uses a token that the model has no embedding for. where: the tokenizer."""
    if data.largest_id >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(data.largest_id)
        raise ConfigError(
            f"the tokenizer does not fit the model: the data uses token {data.largest_id} ({token!r}), and the model's "
            f"vocabulary ends at {vocab_size - 1}; give the model's own tokenizer, or resize its embeddings first",
            where=where,
        )


def build_datasets(arguments: BridgeArguments, tokenizer: PreTrainedTokenizerFast) -> DataBundle:
    """The train and validation sets of a run. Called by every rank; one a node does the work, the others wait for it.

    A sample of SFT holds at most ``model.seq_length`` tokens (BOS, prompt, answer and end of turn together); a block of
    pretraining seq_length + 1, of which the last is only a target, and neighbouring blocks share that token: every
    token is predicted once. Documents follow one another in a block and may attend to each other.

    The split into train and validation is by row, chosen by ``rng.seed``, the same at any layout.
    Raises ConfigError for whatever is wrong with the data: it names file, line and row, or counts why nothing is left.
    """
    data = arguments.dataset
    assert data.data_path is not None  # validated
    sources = {"train": Source(data.data_path, split=data.split, max_samples=data.max_samples)}
    if data.validation_data_path:
        sources["validation"] = _validation_source(data.validation_data_path)
    folder = cached_folder(_key(arguments, tokenizer, sources), lambda to: _build(to, arguments, tokenizer, sources))
    meta = json.loads((folder / "meta.json").read_text())
    ledger = Ledger.from_dict(meta["ledger"])
    ledger.source = ", ".join(source.path for source in sources.values())
    validation = TokenizedDataset.open(folder, "validation") if ledger.validation is not None else None
    return DataBundle(TokenizedDataset.open(folder, "train"), validation, ledger, meta["largest_id"])


def _validation_source(path: str) -> Source:
    key = "dataset.validation_data_path"
    if Path(path).expanduser().is_dir():
        try:
            return Source(path, split="validation", key=key)
        except ConfigError:
            return Source(path, split="train", key=key)  # a folder whose file names say no split
    if Path(path).expanduser().exists():
        return Source(path, key=key)
    return Source(path, split="validation", key=key)


def _key(arguments: BridgeArguments, tokenizer: PreTrainedTokenizerFast, sources: dict[str, Source]) -> str:
    """sha256 of everything the tokens depend on: content of the data, the tokenizer, and the options."""
    import tokenizers
    import transformers

    data = asdict(arguments.dataset)
    for name in ("data_path", "validation_data_path", "pad_to", "shuffle", "num_workers"):
        del data[name]  # where the data lies, and how it is batched, change no token
    what = {
        "version": CACHE_VERSION,
        "libraries": [tokenizers.__version__, transformers.__version__],
        "sources": {name: source.fingerprint() for name, source in sources.items()},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "adds_bos": list(tokenizer("a").input_ids),
        "options": data,
        "seq_length": arguments.model.seq_length,
        "stage": arguments.stage,
        "seed": arguments.rng.seed if arguments.dataset.validation_split else None,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _build(
    folder: Path, arguments: BridgeArguments, tokenizer: PreTrainedTokenizerFast, sources: dict[str, Source]
) -> None:
    """Tokenises every source into ``folder``; meta.json is written last."""
    data, seq_length = arguments.dataset, arguments.model.seq_length
    if seq_length < 2:
        raise ConfigError(f"model.seq_length must be at least 2, got {seq_length}")
    first_rows = list(islice(sources["train"], FIRST_ROWS))
    if not first_rows:
        raise ConfigError("the data set is empty: it has no rows", where=sources["train"].path)
    data_format, seen = recognise(first_rows, data.dataset_format, arguments.stage)
    template, warnings = None, []
    if arguments.stage != "pretrain":
        template = choose_template(
            data.prompt_template, data_format, tokenizer, alpaca_response_newline=data.alpaca_response_newline
        )
        warnings = template.warnings()
    preparation = Preparation(
        data_format,
        template,
        Encoder(tokenizer, template.control_tokens() if template else ()),
        seq_length,
        data.truncation,
    )
    ledger = Ledger(
        format=data_format,
        format_seen=seen,
        template=template.name if template else "none (next-token loss on all text)",
        seq_length=seq_length,
        warnings=warnings,
    )
    if data.validation_split or "validation" in sources:
        ledger.validation = SplitLedger()
    largest_id = 0
    for name, source in sources.items():
        total = len(source)
        if not total:
            raise ConfigError("the data set is empty: it has no rows", where=source.path)
        held_out = np.zeros(total, dtype=bool)
        if data.validation_split:
            held_out = _held_out(total, data.validation_split, arguments.rng.seed)
        writers = {
            split: SplitWriter(DatasetWriter(folder, split), _counts(ledger, split), preparation)
            for split in (("train", "validation") if data.validation_split else (name,))
        }
        row = 0
        for chunk in prepared_chunks(source, preparation, data.num_workers):
            chosen = held_out[row : row + len(chunk)]
            row += len(chunk)
            for item, held in zip(chunk, chosen, strict=True):
                writers["validation" if held else name].add(item)
        for split, writer in writers.items():
            writer.close()
            largest_id = max(largest_id, writer.writer.largest_id)
            if not writer.counts.samples:
                raise ConfigError(_nothing_left(split, writer.counts, arguments), where=source.path)
    meta = {"version": CACHE_VERSION, "ledger": ledger.to_dict(), "largest_id": largest_id}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _counts(ledger: Ledger, split: str) -> SplitLedger:
    counts = ledger.train if split == "train" else ledger.validation
    assert counts is not None
    return counts


def _held_out(rows: int, fraction: float, seed: int) -> np.ndarray:
    """bool [rows]: which rows are for validation, chosen by seed; at least one, and not all."""
    count = max(1, round(rows * fraction))
    if count >= rows:
        raise ConfigError(
            f"dataset.validation_split {fraction} of {rows} rows leaves nothing to train on; "
            "lower it, add rows, or set dataset.validation_data_path"
        )
    raw = np.random.Philox(np.random.SeedSequence([seed, 0x5EED])).random_raw(rows)
    chosen = np.zeros(rows, dtype=bool)
    chosen[np.argsort(raw, kind="stable")[:count]] = True
    return chosen


def _nothing_left(split: str, counts: SplitLedger, arguments: BridgeArguments) -> str:
    what = f"the {split} set is empty: of {counts.rows:,} rows none is left ({counts.why_dropped()})"
    if counts.dropped_too_long:
        option = " or set dataset.truncation: left" if arguments.dataset.truncation == "drop" else ""
        return f"{what}; raise model.seq_length (now {arguments.model.seq_length}){option}"
    if counts.dropped_no_supervised:
        return f"{what}: every token is masked; check the answers and dataset.prompt_template"
    return what
