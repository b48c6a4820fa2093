"""Marks in a conversation's texts, which say where a chat template printed each of them; and control tokens hidden."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

from primus_bridge.data.messages import Conversation, Message, ToolCall

ESCAPE, OPEN, CLOSE = "\ufdd1", "\ufdd2", "\ufdd3"
MARK = re.compile(f"([{OPEN}{CLOSE}])(\\d+)\\.(\\w+)\\1")

THINK_TAG = re.compile(r"(\s*(?:</?think(?:ing)?>|\[/?THINK\])\s*)")


class Printed(NamedTuple):
    """A marked text where the template printed it: ``text[start:end]``."""

    turn: int
    part: str
    """A number: that part of the content; ``t``: the thought; ``n`` and a number: the name of that tool call."""
    start: int
    end: int


def outside(text: str, turn: int, part: str = "0") -> str:
    name = f"{turn}.{part}"
    return f"{OPEN}{name}{OPEN}{text}{CLOSE}{name}{CLOSE}"


def inside(text: str, turn: int, part: str = "0") -> str:
    """Marks within the outer white space: for templates that strip."""
    core = text.strip()
    if not core:
        return text
    start = text.find(core)
    return text[:start] + outside(core, turn, part) + text[start + len(core) :]


def thoughts(text: str, turn: int, part: str = "0") -> str:
    """Marks each part between thinking tags, which the template may take apart and put together again."""
    parts = THINK_TAG.split(text)
    return "".join(
        text if i % 2 else inside(text, turn, part if part == "t" else str(i)) for i, text in enumerate(parts)
    )


def marked(conversation: Conversation, mark: Callable[..., str], *, everyone: bool) -> Conversation:
    """The conversation with the assistants' texts marked by ``mark``, and, with ``everyone``, the others' within."""
    messages = []
    for i, message in enumerate(conversation.messages):
        if message.role == "assistant":
            message = message._replace(
                content=mark(message.text, i) if message.text else "",
                context="",
                thinking=mark(message.thinking, i, "t") if message.thinking else "",
                tool_calls=tuple(
                    call._replace(name=outside(call.name, i, f"n{k}")) for k, call in enumerate(message.tool_calls)
                ),
            )
        elif everyone:
            message = message._replace(content=inside(message.text, i), context="")
        messages.append(message)
    return conversation._replace(messages=messages)


def names(conversation: Conversation) -> set[tuple[int, str]]:
    """(turn, part) of every mark in a marked conversation."""
    out = set()
    for message in conversation.messages:
        for text in (message.content, message.thinking, *(call.name for call in message.tool_calls)):
            out |= {(int(match[2]), match[3]) for match in MARK.finditer(text)}
    return out


def found(text: str) -> list[Printed] | None:
    """Where the marks of a rendered text lie in the text without them; None when the template took a text apart."""
    printed, removed, seen = [], 0, set()
    matches = list(MARK.finditer(text))
    for opened, closed in zip_longest(matches[::2], matches[1::2]):
        # each mark once, and its partner next
        if closed is None or opened[1] != OPEN or closed[1] != CLOSE:
            return None
        name = (int(opened[2]), opened[3])
        if name != (int(closed[2]), closed[3]) or name in seen:
            return None
        seen.add(name)
        start = opened.start() - removed
        removed += len(opened[0])
        printed.append(Printed(*name, start, closed.start() - removed))
        removed += len(closed[0])
    return printed


def hidden(conversation: Conversation, control: re.Pattern) -> tuple[Conversation, bool]:
    """The conversation with control tokens in its texts written as hex between escapes, and whether there were any."""
    count = 0

    def hide(value: Any) -> Any:
        nonlocal count
        if isinstance(value, str):
            value, n = control.subn(lambda match: ESCAPE + match[0].encode().hex() + ESCAPE, value)
            count += n
            return value
        if isinstance(value, dict):
            return {hide(key): hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [hide(item) for item in value]
        return value

    messages = [_hidden_message(message, hide) for message in conversation.messages]
    return Conversation(messages, conversation.skipped_turns, tuple(hide(list(conversation.tools)))), bool(count)


def _hidden_message(message: Message, hide: Callable[[Any], Any]) -> Message:
    calls = tuple(ToolCall(hide(call.name), hide(call.arguments), hide(call.id)) for call in message.tool_calls)
    return message._replace(
        content=hide(message.text),
        context="",
        thinking=hide(message.thinking),
        tool_calls=calls,
        name=hide(message.name),
        tool_call_id=hide(message.tool_call_id),
    )


def shown(text: str) -> list[tuple[str, bool]]:
    """(part, whether it was hidden) of a rendered text."""
    parts = text.split(ESCAPE)
    return [(bytes.fromhex(part).decode() if i % 2 else part, i % 2 == 1) for i, part in enumerate(parts) if part]
