"""Formats: a row of alpaca, sharegpt, messages or text data becomes one internal list of messages (role, content)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from primus_bridge.data.sources import Row
from primus_bridge.errors import ConfigError, did_you_mean

# noncharacters (never legal in interchanged text) that templates.py and tokenize.py use as internal marks
RESERVED = r"\ufdd0-\ufdd3"
# half of a character, as a broken escape in JSON leaves it: no text that a tokenizer could read
SURROGATES = r"\ud800-\udfff"
UNUSABLE = re.compile(f"([{RESERVED}])|[{SURROGATES}]")

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}


# fields that change what a turn means: never ignored in silence
UNSUPPORTED_IN_TURN = ("tool_calls", "function_call", "reasoning_content", "weight")


class Message(NamedTuple):
    role: str
    """system, user or assistant."""
    content: str
    context: str = ""
    """Alpaca's ``input`` beside the instruction, for templates that print it in a section of its own."""

    @property
    def text(self) -> str:
        """Content and context as one text, joined by a newline."""
        return f"{self.content}\n{self.context}" if self.context else self.content


class Conversation(NamedTuple):
    messages: list[Message]
    skipped_turns: int
    """Turns left out: before the first human turn, or after the last answer."""


class RowError(Exception):
    """A row that cannot be used: the column (a path such as ``messages[2].content``) and what is wrong with it."""

    def __init__(self, column: str, message: str):
        super().__init__(column, message)
        self.column, self.message = column, message

    def at(self, row: Row) -> ConfigError:
        return ConfigError(f"row {row.number}, column '{self.column}': {self.message}", where=row.where)


def _text(value: Any, column: str, *, optional: bool = False) -> str:
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise RowError(column, f"expected text, found {kind}; give every row text there")
    if unusable := UNUSABLE.search(value):
        if unusable[1]:
            raise RowError(column, "holds a Unicode noncharacter (U+FDD0 to U+FDD3), which is reserved; remove it")
        raise RowError(column, "holds half of a surrogate pair (U+D800 to U+DFFF), which is no character; mend it")
    return value


def _answer(value: Any, column: str) -> str:
    text = _text(value, column)
    if not text.strip():
        raise RowError(column, "the sample has no answer (empty text); give it one or remove the row")
    return text


def _column(data: dict[str, Any], name: str) -> Any:
    if name not in data:
        found = ", ".join(map(str, data)) or "no columns"
        raise RowError(name, f"missing{did_you_mean(name, data)} (the row has: {found})")
    return data[name]


def _list(value: Any, column: str) -> list:
    if not isinstance(value, list):
        raise RowError(column, f"expected a list of turns, found {type(value).__name__}")
    return value


def alpaca(data: dict[str, Any]) -> Conversation:
    """Columns instruction, output; optional input, system, history (a list of [question, answer])."""
    instruction = _text(_column(data, "instruction"), "instruction")
    context = _text(data.get("input"), "input", optional=True)
    output = _answer(_column(data, "output"), "output")
    messages = []
    if system := _text(data.get("system"), "system", optional=True):
        messages.append(Message("system", system))
    for i, pair in enumerate(_list(data.get("history") or [], "history")):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"history[{i}]", "expected a pair [question, answer]")
        messages.append(Message("user", _text(pair[0], f"history[{i}][0]")))
        messages.append(Message("assistant", _answer(pair[1], f"history[{i}][1]")))
    messages += [Message("user", instruction, context), Message("assistant", output)]
    return Conversation(messages, 0)


def _turns(turns: list, column: str, role_key: str, content_key: str) -> Conversation:
    messages = []
    for i, turn in enumerate(turns):
        place = f"{column}[{i}]"
        if not isinstance(turn, dict):
            raise RowError(place, f"expected an object with '{role_key}' and '{content_key}'")
        for key in UNSUPPORTED_IN_TURN:
            if turn.get(key) not in (None, "", [], 1):
                raise RowError(f"{place}.{key}", "is not supported; remove it to train on the text alone")
        name = _text(turn.get(role_key), f"{place}.{role_key}")
        if name not in ROLES:
            raise RowError(f"{place}.{role_key}", f"unknown role '{name}'; known are {', '.join(ROLES)}")
        content, where = turn.get(content_key), f"{place}.{content_key}"
        if isinstance(content, list):  # OpenAI's content parts
            content = "".join(_text(_text_part(part, where), where) for part in content)
        role = ROLES[name]
        messages.append(Message(role, _answer(content, where) if role == "assistant" else _text(content, where)))
    total, head = len(messages), []
    if messages and messages[0].role == "system":
        head, messages = messages[:1], messages[1:]
    while messages and messages[0].role != "user":
        messages = messages[1:]
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    if not messages:
        raise RowError(
            column, "the sample has no answer (no assistant turn after a user turn); add one or remove the row"
        )
    return Conversation(head + messages, total - len(head) - len(messages))


def _text_part(part: Any, where: str) -> Any:
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise RowError(where, "holds a part that is not text; only text parts are supported")
    return part.get("text")


def sharegpt(data: dict[str, Any]) -> Conversation:
    """Column conversations: turns of {from: human|gpt|system, value}; optional column system."""
    conversation = _turns(_list(_column(data, "conversations"), "conversations"), "conversations", "from", "value")
    return _with_system(data, conversation)


def messages(data: dict[str, Any]) -> Conversation:
    """Column messages (or conversations) of {role, content}: OpenAI's shape; optional column system."""
    column = "conversations" if "messages" not in data and "conversations" in data else "messages"
    return _with_system(data, _turns(_list(_column(data, column), column), column, "role", "content"))


def _with_system(data: dict[str, Any], conversation: Conversation) -> Conversation:
    if data.get("tools") not in (None, "", [], "[]"):
        raise RowError("tools", "tool definitions are not supported; remove the column to train on the text alone")
    system = _text(data.get("system"), "system", optional=True)
    if system and conversation.messages[0].role != "system":
        return conversation._replace(messages=[Message("system", system), *conversation.messages])
    return conversation


def text(data: dict[str, Any]) -> str:
    """Column text: a document, for pretraining. May be empty (it is then counted and left out)."""
    return _text(_column(data, "text"), "text")


CONVERSATIONS = {"alpaca": alpaca, "sharegpt": sharegpt, "messages": messages}


def _recognise_row(data: dict[str, Any], stage: str) -> str | None:
    if stage == "pretrain":
        return "text" if "text" in data else None
    for column in ("messages", "conversations"):
        turns = data.get(column)
        if turns is None:
            continue
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, dict) and "from" in first and "value" in first:
            return "sharegpt"
        if column == "messages" or (isinstance(first, dict) and "role" in first and "content" in first):
            return "messages"  # whatever is wrong with the turns, converting the row says it
    return "alpaca" if "instruction" in data and "output" in data else None


def recognise(rows: Sequence[Row], asked: str, stage: str) -> tuple[str, str]:
    """(format, how it was chosen) from ``dataset_format`` and the first rows.

    Raises ConfigError when 'auto' fits no known format, or the format does not fit the stage.
    """
    known = (
        "text (column text)"
        if stage == "pretrain"
        else "alpaca (instruction, output), sharegpt (conversations), messages"
    )
    if asked != "auto":
        if (asked == "text") != (stage == "pretrain"):
            raise ConfigError(f"dataset_format '{asked}' does not fit stage '{stage}', which takes {known}")
        return asked, "asked for"
    seen = [_recognise_row(row.data, stage) for row in rows]
    columns = ", ".join(map(str, rows[0].data))
    # a later row that lacks a column is that row's fault: converting it names the column and the line
    odd = next((row for row, found in zip(rows, seen, strict=True) if found not in (seen[0], None)), None)
    if seen[0] is None or odd is not None:
        mend = "set dataset.dataset_format, or rename the columns"
        if stage == "pretrain" and _recognise_row(rows[0].data, "sft"):
            mend = "these look like instruction rows: set stage: sft"
        elif stage != "pretrain" and "text" in rows[0].data:
            mend = "these look like plain text: set stage: pretrain"
        if odd is not None:
            columns += f"; and then {', '.join(map(str, odd.data))}"
        raise ConfigError(
            f"dataset_format 'auto' does not recognise the first rows (columns: {columns}); "
            f"stage '{stage}' takes {known}; {mend}",
            where=(odd or rows[0]).where,
        )
    return seen[0], f"recognised from columns {columns}"
