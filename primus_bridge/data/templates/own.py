"""What the templates written here share: pieces by kind, the tokenizer's BOS and EOS, refusals that name the turn."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from primus_bridge.data.messages import Conversation, Message, RowError, ToolCall
from primus_bridge.data.templates.base import Piece, Rendered
from primus_bridge.data.tokenizer import adds_bos
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prompt(text: str, turn: int = -1) -> Piece:
    """The template's own text that the model reads."""
    return Piece(text, supervised=False, literal=True, turn=turn)


def said(text: str, turn: int) -> Piece:
    """The data's text that the model reads."""
    return Piece(text, supervised=False, literal=False, turn=turn)


def answer(text: str, turn: int) -> Piece:
    """The data's text that the model writes."""
    return Piece(text, supervised=True, literal=False, turn=turn)


def end(text: str, turn: int) -> Piece:
    """The template's own text that the model writes: an end of turn, the tags around a tool call."""
    return Piece(text, supervised=True, literal=True, turn=turn)


def to_json(value: Any) -> str:
    """JSON as transformers' ``tojson`` and mistral-common write it."""
    return json.dumps(value, ensure_ascii=False)


def arguments_text(call: ToolCall) -> str:
    """The arguments of a call as JSON; text that the data gives stays as it is."""
    return call.arguments if isinstance(call.arguments, str) else to_json(call.arguments)


def split_thought(message: Message) -> tuple[str, str]:
    """(thought, answer) of an assistant: from ``thinking``, or from ``<think>...</think>`` at the content's start.

    Source: Qwen3's chat_template, which takes a content apart in this way.
    """
    content = message.text
    if message.thinking or "</think>" not in content:
        return message.thinking.strip("\n"), content
    before, _, _ = content.partition("</think>")
    thought = before.rstrip("\n").split("<think>")[-1].strip("\n")
    return thought, content.split("</think>")[-1].lstrip("\n")


class OwnTemplate(ABC):
    """A family's template as code. Subclasses give ``name`` and ``_pieces``."""

    name = ""
    markers: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("system", "user", "assistant")
    takes_tools = False
    """Tool definitions and calls have a place; a tool's answers where 'tool' is one of the roles."""
    takes_thinking = False

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.adds_bos = adds_bos(tokenizer)

    def control_tokens(self) -> Sequence[str]:
        return self.markers

    def warnings(self) -> list[str]:
        known = self.tokenizer.get_added_vocab()
        missing = [marker for marker in self.markers if marker not in known]
        if not missing:
            return []
        return [
            f"template '{self.name}': the tokenizer has no token {', '.join(missing)}; "
            "the model learns the marker as ordinary text, and generation must stop on that text"
        ]

    def render(self, conversation: Conversation) -> Rendered:
        if conversation.tools and not self.takes_tools:
            self._refuse("tools", "tool definitions")
        for i, message in enumerate(conversation.messages):
            if message.role not in self.roles:
                self._refuse("role", f"a {message.role} turn (turn {i + 1})")
            if message.tool_calls and not self.takes_tools:
                self._refuse("tool_calls", f"tool calls (turn {i + 1})")
            if message.thinking and not self.takes_thinking:
                self._refuse("thinking", f"thoughts (turn {i + 1})")
        pieces = self._pieces(conversation)
        return Rendered([piece for piece in pieces if piece.text], self._prepends_bos())

    @abstractmethod
    def _pieces(self, conversation: Conversation) -> list[Piece]:
        """The family's text; empty pieces are left out."""

    def _prepends_bos(self) -> bool:
        """Whether BOS is left to the tokenizer; False where ``_pieces`` writes it."""
        return self.adds_bos

    def _refuse(self, column: str, what: str) -> NoReturn:
        others = {"thinking": "qwen3 or deepseek"}.get(column, "qwen2.5, qwen3 or mistral")
        raise RowError(
            column,
            f"template '{self.name}' has no place for {what}; use prompt_template {others}, chat_template with a "
            "tokenizer whose template has one, or remove them from the row",
        )

    def _bos(self) -> str:
        return self.tokenizer.bos_token or ""

    def _eos(self) -> str:
        if self.tokenizer.eos_token is None:
            raise ConfigError(
                f"template '{self.name}' ends answers with EOS, and the tokenizer has no eos_token; "
                "set one in its tokenizer_config.json, or use prompt_template: chatml"
            )
        return self.tokenizer.eos_token


def alternating(messages: Sequence[Message], name: str) -> tuple[str, list[tuple[int, Message]]]:
    """(system text or '', the other turns with their indices). Raises RowError unless user and assistant alternate."""
    turns = list(enumerate(messages))
    system = ""
    if turns and turns[0][1].role == "system":
        system, turns = turns[0][1].text, turns[1:]
    if len(turns) % 2 or any(turn.role != ("user", "assistant")[k % 2] for k, (_, turn) in enumerate(turns)):
        roles = ", ".join(turn.role for _, turn in turns)
        raise RowError("role", f"template '{name}' needs user and assistant turns that alternate, found {roles}")
    return system, turns
