"""What a prompt template is: messages in, pieces of text out, each supervised or not, the template's or the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from primus_bridge.data.messages import Conversation


class Piece(NamedTuple):
    text: str
    supervised: bool
    """Whether the model writes it: assistant content (thoughts and tool calls too) and its end of turn."""
    literal: bool
    """True: the template's own text, in which special tokens are special. False: user text, where they are text."""
    turn: int = -1
    """Index into the conversation's messages of the message it belongs to (headers and ends included); -1: none
    (BOS, a default system text, tool definitions)."""


class Rendered(NamedTuple):
    pieces: list[Piece]
    bos: bool = False
    """BOS comes before the pieces as the tokenizer itself adds it, not as text of the template."""


class Template(Protocol):
    """A template is pickled to worker processes. Its loss weights are none of its business (data/masks.py)."""

    name: str

    def control_tokens(self) -> Sequence[str]:
        """Markers that are control tokens even when the tokenizer does not call them special."""

    def warnings(self) -> list[str]:
        """What a user should know about this template with this tokenizer."""

    def render(self, conversation: Conversation) -> Rendered:
        """Raises RowError when the family's template cannot express this conversation."""
