"""Tokenising: rendered pieces become ids and loss weights, with special tokens only where the template wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from primus_bridge.data.chat_template import control_tokens
from primus_bridge.data.templates import Piece, Rendered
from primus_bridge.data.tokenizer import adds_bos
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

    def encode_rendered(self, samples: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32 [n], loss_weights uint8 [n]) of each sample; loss_weights[i] is the weight of predicting token i.

        The first token is never predicted: its weight is 0.
        """
        runs: list[
            tuple[str, bool, bool]
        ] = []  # text with aliases, tokenised by the copy without prefix, has an anchor
        layout: list[
            list[tuple[list[int], bool]]
        ] = []  # a sample's supervision changes: (indices into runs, supervised)
        for sample in samples:
            spans: list[tuple[list[int], bool]] = []
            previous = None  # what the text before ends with: None at the start, an alias, or "" for plain text
            for text, supervised in self._merged(sample.pieces):
                indices = []
                for part, middle, anchored in self._parts(text, previous):
                    indices.append(len(runs))
                    runs.append((part, middle, anchored))
                spans.append((indices, supervised))
                previous = self._trailing_alias(text)
            layout.append(spans)
        encoded = self._encode(runs)
        out = []
        for sample, spans in zip(samples, layout, strict=True):
            parts = [np.array([self.bos_token_id] if sample.bos else [], dtype=np.int32)]
            flags = [np.zeros(len(parts[0]), dtype=np.uint8)]
            for indices, supervised in spans:
                for index in indices:
                    parts.append(encoded[index])
                    flags.append(np.full(len(encoded[index]), supervised, dtype=np.uint8))
            weights = np.concatenate(flags)
            weights[:1] = 0
            out.append((np.concatenate(parts), weights))
        return out

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """ids int32 [n] of plain documents: BOS where the tokenizer adds one, the text, EOS. No text is special.

        Raises ConfigError when the tokenizer has no EOS to end a document with.
        """
        if self.eos_id is None:
            raise ConfigError("pretraining ends every document with EOS, and the tokenizer has no eos_token; set one")
        bos = [] if self._document_bos is None else [self._document_bos]
        runs = [(text, False, False) for text in texts]
        return [np.array([*bos, *ids.tolist(), self.eos_id], dtype=np.int32) for ids in self._encode(runs)]

    def prefix_length(self, sample: Rendered, ids: np.ndarray) -> int:
        """How many leading tokens of ``ids`` (the whole sample's) are its head: BOS and the system message."""
        head, _ = self.encode_rendered([Rendered(sample.pieces[: sample.head], 0, sample.bos)])[0]
        shared = min(len(head), len(ids))
        differs = np.flatnonzero(head[:shared] != ids[:shared])
        return int(differs[0]) if len(differs) else shared

    def _merged(self, pieces: Sequence[Piece]) -> list[tuple[str, bool]]:
        """Neighbouring pieces of the same supervision as one text, special tokens of literal ones as aliases."""
        merged: list[list[Any]] = []
        for text, supervised, literal in pieces:
            if literal:
                text = self._control.sub(lambda match: self._aliases[match[0]], text)
            if not text:
                continue
            if merged and merged[-1][1] == supervised:
                merged[-1][0] += text
            else:
                merged.append([text, supervised])
        return [(text, supervised) for text, supervised in merged]

    def _parts(self, text: str, previous: str | None) -> list[tuple[str, bool, bool]]:
        """How a run is tokenised: (text, by the copy without prefix space, its first token is an anchor)."""
        if previous is None or text.startswith(ALIAS):
            return [(text, False, False)]
        if previous:
            return [(previous + text, False, True)]
        if self._middle is self._start or ALIAS not in text:
            return [(text, True, False)]
        cut = text.index(ALIAS)
        return [(text[:cut], True, False), (text[cut:], False, False)]

    @staticmethod
    def _trailing_alias(text: str) -> str:
        if not text.endswith(ALIAS):
            return ""
        return text[text.rindex(ALIAS, 0, -1) :]

    def _encode(self, runs: Sequence[tuple[str, bool, bool]]) -> list[np.ndarray]:
        """Real ids, int32, of each run (text, by the copy without prefix space, its first token is an anchor)."""
        out = [np.empty(0, dtype=np.int32)] * len(runs)
        for backend, want in ((self._start, False), (self._middle, True)):
            which = [i for i, (_, middle, _) in enumerate(runs) if middle == want]
            encodings = backend.encode_batch_fast([runs[i][0] for i in which], add_special_tokens=False)
            for i, encoding in zip(which, encodings, strict=True):
                ids = np.array(encoding.ids, dtype=np.int32)
                if self._holds_control(ids):
                    ids = self._encode_apart(runs[i][0], backend)
                out[i] = self._unaliased(ids[1:] if runs[i][2] else ids)
        return out

    def _holds_control(self, ids: np.ndarray) -> bool:
        return bool(self._is_control[ids[ids < self._first_alias]].any())

    def _unaliased(self, ids: np.ndarray) -> np.ndarray:
        aliased = ids >= self._first_alias
        if aliased.any():
            ids[aliased] = self._behind_alias[ids[aliased] - self._first_alias]
            ids = ids[ids >= 0]  # the boundary stands for nothing
        return ids

    def _encode_apart(self, text: str, backend) -> np.ndarray:
        """For a vocabulary whose model spells a special token from plain text: its letters are kept apart."""
        apart = self._control.sub(lambda match: match[0][0] + self._boundary + match[0][1:], text)
        ids = np.array(backend.encode(apart, add_special_tokens=False).ids, dtype=np.int32)
        if self._holds_control(ids):
            raise ConfigError(
                f"the tokenizer reads a special token in plain text, which cannot be avoided: {text[:60]!r}"
            )
        return ids


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
