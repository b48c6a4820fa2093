"""Sequences and previews made of conversations in ChatML, with a real tokenizer, without the rest of the pipeline."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerFast

from primus_bridge.data.inspect import InspectedSequence
from primus_bridge.data.pieces import token_pieces
from primus_bridge.preview.report import Preview, special_ids
from tests.data import families

Turn = tuple[str, str, float]
"""role, content, loss weight of the content and its end of turn."""


def chat(*turns: str, weight: float = 1.0) -> list[Turn]:
    """User and assistant in turn; the assistant's are supervised."""
    roles = ("user", "assistant")
    return [(roles[i % 2], content, weight * (i % 2)) for i, content in enumerate(turns)]


def sequence_of(documents: list[list[Turn]], tokenizer: PreTrainedTokenizerFast | None = None) -> InspectedSequence:
    """A pack of the documents, in ChatML."""
    tokenizer = tokenizer or families.qwen()
    out = InspectedSequence([], [], [], [], [], [], [], "", "", [])
    for segment, turns in enumerate(documents):
        rows = []
        for turn, (role, content, weight) in enumerate(turns):
            for text, piece_weight in ((f"<|im_start|>{role}\n", 0.0), (f"{content}<|im_end|>", weight), ("\n", 0.0)):
                for token in tokenizer(text, add_special_tokens=False).input_ids:
                    rows.append((token, piece_weight, turn, role))
        out.ids += [row[0] for row in rows]
        out.loss_weights += [row[1] for row in rows]
        out.turns += [row[2] for row in rows]
        out.roles += [row[3] for row in rows]
        out.position_ids += range(len(rows))
        out.segments += [segment] * len(rows)
        out.pieces += token_pieces(tokenizer, [row[0] for row in rows])
        out.sources.append(f"/data/chat.jsonl:{segment + 1}")
    out.text = "".join(out.pieces)
    out.supervised_text = "".join(p for p, weight in zip(out.pieces, out.loss_weights, strict=True) if weight)
    return out


def preview_of(sequences: list[InspectedSequence], **changes) -> Preview:
    """A preview of a split that holds exactly these sequences; ``changes`` are fields of it."""
    lengths, supervised = [], []
    for sequence in sequences:
        for segment in range(max(sequence.segments) + 1):
            places = [i for i, s in enumerate(sequence.segments) if s == segment]
            lengths.append(len(places))
            supervised.append(sum(sequence.loss_weights[i] != 0 for i in places))
    values = dict(
        split="train",
        stage="sft",
        tokenizer="/models/tiny",
        template="chatml",
        format="messages",
        seq_length=64,
        packed=False,
        streaming=False,
        total_sequences=len(sequences),
        sequences=sequences,
        special_ids=special_ids(families.qwen()),
        ledger=["data      /data/chat.jsonl", "samples   2", "supervised  20"],
        lengths=np.array(lengths, dtype=np.int64),
        supervised=np.array(supervised, dtype=np.int64),
        fill=None,
    )
    return Preview(**(values | changes))
