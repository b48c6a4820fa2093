"""The squad template: the line that Megatron-Bridge's recipes train on (data/hf_processors/squad.py there)."""

from __future__ import annotations

import pytest

from primus_bridge.data.messages import Message

from . import families
from .encoding import decode, encode, supervised_text


@pytest.mark.parametrize(
    "messages, text, supervised",
    [
        (
            [Message("user", "What forest is it? ", " It is broadleaf."), Message("assistant", " broadleaf ")],
            "Context: It is broadleaf. Question: What forest is it? Answer: broadleaf</s>",
            " broadleaf</s>",
        ),
        ([Message("user", "Why?"), Message("assistant", "So")], "Question: Why? Answer: So</s>", " So</s>"),
        (
            [Message("system", "Be brief."), Message("user", "Why?"), Message("assistant", "So")],
            "Be brief. Question: Why? Answer: So</s>",
            " So</s>",
        ),
    ],
)
def test_one_line(messages, text, supervised):
    tokenizer = families.llama2()
    ids, weights = encode(tokenizer, messages, "squad")
    assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1
    assert decode(tokenizer, ids[1:]).removeprefix(" ") == text  # SentencePiece writes one before the first word
    assert supervised_text(tokenizer, ids, weights) == supervised
