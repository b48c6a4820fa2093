"""Conversations turn by turn: sharegpt ({from, value}) and messages ({role, content}, OpenAI's shape)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from primus_bridge.data.formats.fields import answer, column, rows_of, text
from primus_bridge.data.formats.tools import calls_of_text, calls_of_turn, definitions
from primus_bridge.data.messages import Conversation, Message, RowError, Unusable

CALL = "function_call"
"""Role of an assistant's turn whose content is the calls, as JSON."""

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
    "function_call": CALL,
    "tool_call": CALL,
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}

THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
ASSISTANT_KEYS = (*THINKING_KEYS, "tool_calls", "function_call")


def sharegpt(data: dict[str, Any]) -> Conversation:
    """Column conversations: turns of {from, value}; optional columns system and tools."""
    return finished(read(column(data, "conversations"), "conversations", "from", "value"), data)


def messages(data: dict[str, Any]) -> Conversation:
    """Column messages (or conversations): turns of {role, content}, with tool_calls, tool_call_id, reasoning_content,
    weight or train where they have them; optional columns system and tools."""
    name = "conversations" if "messages" not in data and "conversations" in data else "messages"
    return finished(read(column(data, name), name, "role", "content"), data)


def read(turns: Any, place: str, role_key: str, content_key: str, roles: Mapping[str, str] = ROLES) -> list[Message]:
    """A list of turns as messages, one each; ``place``: its column."""
    return [turn(value, f"{place}[{i}]", role_key, content_key, roles) for i, value in enumerate(rows_of(turns, place))]


def turn(value: Any, place: str, role_key: str, content_key: str, roles: Mapping[str, str] = ROLES) -> Message:
    """One turn as a message. Raises Unusable when it is an answer without text or calls."""
    if not isinstance(value, dict):
        raise RowError(place, f"expected an object with '{role_key}' and '{content_key}'")
    name = text(value.get(role_key), f"{place}.{role_key}")
    if name not in roles:
        raise RowError(f"{place}.{role_key}", f"unknown role '{name}'; known are {', '.join(roles)}")
    role, where = roles[name], f"{place}.{content_key}"
    weight = _weight(value, place)
    if role == CALL:
        return Message("assistant", weight=weight, tool_calls=calls_of_text(value.get(content_key), where))
    content = value.get(content_key)
    if isinstance(content, list):
        content = "".join(_text_part(part, f"{where}[{i}]") for i, part in enumerate(content))
    if role == "assistant":
        calls = calls_of_turn(value, place)
        thinking = next((text(value[key], f"{place}.{key}") for key in THINKING_KEYS if value.get(key)), "")
        content = text(content, where, optional=True) if calls else answer(content, where)
        return Message(role, content, weight=weight, tool_calls=calls, thinking=thinking)
    for key in ASSISTANT_KEYS:
        if value.get(key):
            raise RowError(f"{place}.{key}", f"belongs to an assistant's turn, and this one is the {role}'s; move it")
    if role == "tool":
        name, call_id = (text(value.get(key), f"{place}.{key}", optional=True) for key in ("name", "tool_call_id"))
        return Message(role, text(content, where), weight=weight, name=name, tool_call_id=call_id)
    return Message(role, text(content, where), weight=weight)


def finished(messages: Sequence[Message], data: dict[str, Any]) -> Conversation:
    """The conversation of ``messages`` with the row's columns system and tools.

    Left out and counted: turns before the first user's other than the system's, and those after the last answer.
    Raises Unusable when there is no answer after a user's turn, and RowError for two system texts.
    """
    first = next((i for i, message in enumerate(messages) if message.role == "user"), len(messages))
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if last < first:
        raise Unusable("no_answer")
    kept = [message for message in messages[:first] if message.role == "system"] + list(messages[first : last + 1])
    skipped = len(messages) - len(kept)
    system = text(data.get("system"), "system", optional=True)
    said = kept[0].text if kept[0].role == "system" else ""
    if system and said not in ("", system):
        raise RowError("system", f"two system texts, {system!r:.40} and in the turns {said!r:.40}; keep one")
    if system and not said:
        kept[: kept[0].role == "system"] = [Message("system", system)]
    return Conversation(kept, skipped, definitions(data))


def _text_part(part: Any, where: str) -> str:
    """The text of one of OpenAI's content parts."""
    if isinstance(part, str):
        return text(part, where)
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise RowError(where, "is a part that is not text; only text parts are supported")
    return text(part.get("text"), f"{where}.text")


def _weight(value: dict[str, Any], place: str) -> float | None:
    """The loss weight that the turn gives itself: ``weight``, a number, or ``train``, true or false."""
    weight, train = value.get("weight"), value.get("train")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise RowError(f"{place}.weight", f"expected a number that is not negative, found {weight!r:.40}")
        return float(weight)
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{place}.train", f"expected true or false, found {train!r:.40}")
    return None if train is None else float(train)
