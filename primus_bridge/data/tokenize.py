"""Tokenising: rendered pieces become ids and loss weights, with special tokens only where the template wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from primus_bridge.data.templates.base import Rendered
from primus_bridge.data.tokenizer import adds_bos, control_tokens
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALIAS = "\ufdd0"


class Encoder:
    """A copy of a fast tokenizer's backend that reads special tokens in literal pieces only.

    In the copy special tokens are read as text, and each has an alias, an ordinary added token that no user text can
    hold. Literal text is written with aliases, user text is left alone, and the whole is tokenised at once; alias ids
    then become the real ones. So ids are the library's own for the whole text (prefix spaces, stripping around special
    tokens, and merges across pieces included), and the shared tokenizer is never changed.

    Text is cut where supervision changes, and at special tokens, nowhere else: at inference the prompt is tokenised
    alone too. A cut within text gets no second prefix space (SentencePiece), for which ``_middle`` is a copy without.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, markers: Sequence[str] = ()):
        from tokenizers import AddedToken, Tokenizer

        specification = json.loads(tokenizer.backend_tokenizer.to_str())
        specification["truncation"] = specification["padding"] = None
        # for text without control tokens its own post-processor is never asked: BOS and EOS are written by templates
        specification["post_processor"] = None
        control = control_tokens(tokenizer, markers)
        by_content = {token["content"]: token for token in specification["added_tokens"]}
        for content in control:
            by_content[content]["special"] = True
        self._aliases = {content: f"{ALIAS}{i}{ALIAS}" for i, content in enumerate(control)}
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._boundary = f"{ALIAS}b{ALIAS}"

        def copy(spec: dict[str, Any]) -> Tokenizer:
            backend = Tokenizer.from_str(json.dumps(spec))
            backend.add_tokens(
                [
                    AddedToken(
                        alias,
                        special=False,
                        normalized=False,
                        lstrip=by_content[content]["lstrip"],
                        rstrip=by_content[content]["rstrip"],
                    )
                    for content, alias in self._aliases.items()
                ]
                + [AddedToken(self._boundary, special=False, normalized=False)]
            )
            backend.encode_special_tokens = True
            return backend

        self._start = copy(specification)
        without_prefix = _without_prefix_space(specification)
        self._middle = self._start if without_prefix == specification else copy(without_prefix)

        # aliases were added last: every id from the first of them on is one, and stands for the id in this table
        aliases = (*self._aliases.values(), self._boundary)
        alias_ids = {alias: token for alias in aliases if (token := self._start.token_to_id(alias)) is not None}
        self._first_alias = min(alias_ids.values())
        self._behind_alias = np.full(max(alias_ids.values()) - self._first_alias + 1, -1, dtype=np.int32)
        self._is_control = np.zeros(self._first_alias, dtype=bool)
        for content, alias in self._aliases.items():
            real_id = by_content[content]["id"]
            self._behind_alias[alias_ids[alias] - self._first_alias] = real_id
            # the unknown token may come from any text that the vocabulary cannot spell
            self._is_control[real_id] = content != tokenizer.unk_token

        self.unknown_id = tokenizer.unk_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self._document_bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        self.eos_id = tokenizer.eos_token_id

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for backend in (self._start, self._middle):
            backend.encode_special_tokens = True  # pickling loses it

    def encode_rendered(
        self, samples: Sequence[Rendered], weights: Sequence[Sequence[float]] | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 [n], loss_weights float32 [n]) of each sample: loss_weights[i] is that of predicting token i.

        weights: one a piece, default 1 where it is supervised. The first token is never predicted: its weight is 0.
        """
        runs: list[_Run] = []
        layout: list[list[tuple[_Run, list[float]]]] = []
        for number, sample in enumerate(samples):
            given = weights[number] if weights is not None else [float(piece.supervised) for piece in sample.pieces]
            layout.append([(run, [given[piece] for piece in run.pieces]) for run in self._runs(sample)])
            runs += [run for run, _ in layout[-1]]
        encoded = iter(self._encode(runs))
        out = []
        for sample, spans in zip(samples, layout, strict=True):
            parts = [np.array([self.bos_token_id] if sample.bos else [], dtype=np.int32)]
            values = [np.zeros(len(parts[0]), dtype=np.float32)]
            for run, given in spans:
                ids = next(encoded)
                parts.append(ids)
                if min(given) == max(given):
                    values.append(np.full(len(ids), given[0], dtype=np.float32))
                else:
                    values.append(np.array(given, dtype=np.float32)[self._places(run)])
            loss_weights = np.concatenate(values)
            loss_weights[:1] = 0
            out.append((np.concatenate(parts), loss_weights))
        return out

    def trace(self, sample: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], the index of the piece that each token starts in, int64 [n]; -1 for BOS)."""
        runs = self._runs(sample)
        bos = np.array([self.bos_token_id] if sample.bos else [], dtype=np.int32)
        places = [np.array(run.pieces)[self._places(run)] for run in runs]
        return (
            np.concatenate([bos, *self._encode(runs)]),
            np.concatenate([np.full(len(bos), -1), *places]).astype(np.int64),
        )

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """ids int32 [n] of plain documents: BOS where the tokenizer adds one, the text, EOS. No text is special.

        Raises ConfigError when the tokenizer has no EOS to end a document with.
        """
        if self.eos_id is None:
            raise ConfigError("pretraining ends every document with EOS, and the tokenizer has no eos_token; set one")
        bos = [] if self._document_bos is None else [self._document_bos]
        runs = [_Run(text, [0], [0]) for text in texts]
        return [np.array([*bos, *ids.tolist(), self.eos_id], dtype=np.int32) for ids in self._encode(runs)]

    def _runs(self, sample: Rendered) -> list[_Run]:
        """The texts that are tokenised one by one: neighbouring pieces of the same supervision are one text."""
        merged: list[_Run] = []
        supervised = None
        for index, piece in enumerate(sample.pieces):
            text = piece.text
            if piece.literal:
                text = self._control.sub(lambda match: self._aliases[match[0]], text)
            if not text:
                continue
            if merged and supervised == piece.supervised:
                merged[-1].add(text, index)
            else:
                merged.append(_Run(text, [0], [index]))
                supervised = piece.supervised
        out: list[_Run] = []
        previous = None  # what the text before ends with: None at the start, an alias, or "" for plain text
        for run in merged:
            text = run.text
            out += self._cut(run, previous)
            previous = text[text.rindex(ALIAS, 0, -1) :] if text.endswith(ALIAS) else ""
        return out

    def _cut(self, run: _Run, previous: str | None) -> list[_Run]:
        """How a run is tokenised after ``previous``: with an anchor before it, or (partly) without prefix space."""
        if previous is None or run.text.startswith(ALIAS):
            return [run]
        if previous:
            run.anchor = previous
            return [run]
        if self._middle is self._start:
            return [run]
        if ALIAS not in run.text:
            run.middle = True
            return [run]
        first, rest = run.split(run.text.index(ALIAS))
        first.middle = True
        return [first, rest]

    def _encode(self, runs: Sequence[_Run]) -> list[np.ndarray]:
        """Real ids, int32, of each run."""
        out = [np.empty(0, dtype=np.int32)] * len(runs)
        for backend, want in ((self._start, False), (self._middle, True)):
            which = [i for i, run in enumerate(runs) if run.middle == want]
            encodings = backend.encode_batch_fast([runs[i].whole for i in which], add_special_tokens=False)
            for i, encoding in zip(which, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.int32)
                if self._holds_control(ids):
                    ids = self._encode_apart(runs[i].whole, backend)[0]
                out[i] = self._unaliased(ids[1:] if runs[i].anchor else ids)
        return out

    def _places(self, run: _Run) -> np.ndarray:
        """For each token of the run's real ids, which of its pieces (an index into run.pieces) it starts in."""
        backend = self._middle if run.middle else self._start
        encoding = backend.encode(run.whole, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        if self._holds_control(ids):
            ids, starts = self._encode_apart(run.whole, backend)
        if run.anchor:
            ids, starts = ids[1:], starts[1:] - len(run.anchor)
        aliased = ids >= self._first_alias
        real = np.ones(len(ids), dtype=bool)
        real[aliased] = self._behind_alias[ids[aliased] - self._first_alias] >= 0
        return np.maximum(np.searchsorted(run.starts, starts[real], side="right") - 1, 0)

    def _holds_control(self, ids: np.ndarray) -> bool:
        return bool(self._is_control[ids[ids < self._first_alias]].any())

    def _unaliased(self, ids: np.ndarray) -> np.ndarray:
        aliased = ids >= self._first_alias
        if aliased.any():
            ids[aliased] = self._behind_alias[ids[aliased] - self._first_alias]
            ids = ids[ids >= 0]  # the boundary stands for nothing
        return ids

    def _encode_apart(self, text: str, backend) -> tuple[np.ndarray, np.ndarray]:
        """(ids, starts in text) where a vocabulary spells a special token from plain text: letters are kept apart."""
        apart = self._control.sub(lambda match: match[0][0] + self._boundary + match[0][1:], text)
        encoding = backend.encode(apart, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        if self._holds_control(ids):
            raise ConfigError(
                f"the tokenizer reads a special token in plain text, which cannot be avoided: {text[:60]!r}"
            )
        marks = np.array([match.start() for match in re.finditer(self._boundary, apart)], dtype=np.int64)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        return ids, starts - len(self._boundary) * np.searchsorted(marks, starts, side="left")


@dataclass
class _Run:
    """A text that is tokenised at once, and the pieces it consists of."""

    text: str
    """With aliases for special tokens."""
    starts: list[int]
    """Where each piece begins in it."""
    pieces: list[int]
    """Their indices in the sample."""
    middle: bool = False
    """Tokenised by the copy that puts no space before a text."""
    anchor: str = ""
    """The alias before it, tokenised with it: what follows a special token may depend on it."""

    @property
    def whole(self) -> str:
        return self.anchor + self.text

    def add(self, text: str, piece: int) -> None:
        self.starts.append(len(self.text))
        self.pieces.append(piece)
        self.text += text

    def split(self, at: int) -> tuple[_Run, _Run]:
        left = [i for i, start in enumerate(self.starts) if start < at]
        # the piece that lies across the cut is in both
        right = range(
            left[-1] if left[-1] + 1 == len(self.starts) or self.starts[left[-1] + 1] > at else left[-1] + 1,
            len(self.starts),
        )
        return (
            _Run(self.text[:at], [self.starts[i] for i in left], [self.pieces[i] for i in left]),
            _Run(self.text[at:], [max(0, self.starts[i] - at) for i in right], [self.pieces[i] for i in right]),
        )


def _without_prefix_space(specification: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, which puts no space (or U+2581) before a text."""

    def walk(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        part = dict(part)
        for children in ("normalizers", "pretokenizers"):
            if children in part:
                part[children] = [walk(child) for child in part[children] if child["type"] != "Prepend"]
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        return None if part.get("type") == "Prepend" else part

    return specification | {key: walk(specification[key]) for key in ("normalizer", "pre_tokenizer")}
