"""The one internal form of a conversation: messages of (role, content, loss weight, tool calls)."""

from __future__ import annotations

from typing import Any, NamedTuple

from primus_bridge.errors import ConfigError


class ToolCall(NamedTuple):
    name: str
    arguments: Any
    """A mapping; or the text itself where it is no JSON object."""
    id: str = ""


class Message(NamedTuple):
    role: str
    """system, user, assistant or tool (a tool's answer)."""
    content: str = ""
    context: str = ""
    """Alpaca's ``input`` or Dolly's ``context`` beside the instruction, for templates that have a section for it."""
    weight: float | None = None
    """Loss weight of the content and its end of turn, as the data says it; None: by ``dataset.loss_on``."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant calls; its content may then be empty."""
    thinking: str = ""
    """An assistant's reasoning before its answer (``reasoning_content``), without tags."""
    name: str = ""
    """Of a tool turn: the function that answers."""
    tool_call_id: str = ""

    @property
    def text(self) -> str:
        """Content and context as one text, joined by a newline."""
        return f"{self.content}\n{self.context}" if self.context else self.content


class Conversation(NamedTuple):
    messages: list[Message]
    skipped_turns: int = 0
    """Turns left out: before the first user turn, after the last answer, or of an OASST tree (deleted, unreviewed)."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON-schema function definitions, as the data has them."""


class RowError(Exception):
    """A row that cannot be used: the column (a path such as ``messages[2].content``) and what is wrong with it."""

    def __init__(self, column: str, message: str):
        super().__init__(column, message)
        self.column, self.message = column, message

    def at(self, row: Any) -> ConfigError:
        """The user's error, at the place of a sources.Row."""
        return ConfigError(f"row {row.number}, column '{self.column}': {self.message}", where=row.where)


class Unusable(Exception):
    """A sound row that gives no sample; ``reason`` is one of ledger.DROPPED_REASONS, where it is counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
