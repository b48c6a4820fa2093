"""The text of each token of a document, such that the texts joined are the document's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WINDOW = 16
"""Tokens before one that its text may depend on, such as the first token's prefix space."""
REPLACEMENT = "\ufffd"
"""What decoders make of bytes that are no character yet."""


def token_pieces(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text of each token, special tokens included; joined they are what the tokenizer makes of all ``ids``.

    A character whose bytes are in several tokens is the last one's; the others have "". Decoders are asked, not
    imitated: a token's text is by how much the decoded text grows with it. Bytes that never become a character are
    U+FFFD, which comes with the next token that ends in something else.
    """
    ids = [int(token) for token in ids]

    def decode(start: int, end: int) -> str:
        return tokenizer.backend_tokenizer.decode(ids[start:end], skip_special_tokens=False)

    pieces: list[str] = []
    start = settled = 0  # decoded from, and up to where the text is sure to stay
    known = text = ""  # of ids[start:settled], and of all up to the current token
    ends = [0]  # places since ``start`` where a character ends, to start from later

    def grown(end: int) -> str:
        # a decoder with byte fallback gives up a whole run of byte tokens when the last character is not complete
        return text[len(known) :] if text.startswith(known) else decode(settled, end)

    for end in range(1, len(ids) + 1):
        text = decode(start, end)
        if text.endswith(REPLACEMENT):
            pieces.append("")
            continue
        pieces.append(grown(end))
        known, settled = text, end
        ends.append(end)
        if end - start >= 2 * WINDOW:
            start = max(place for place in ends if place <= end - WINDOW)
            ends = [place for place in ends if place >= start]
            known = decode(start, end)
    if settled < len(ids):
        pieces[-1] = grown(len(ids))
    return pieces
