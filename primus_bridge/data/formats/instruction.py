"""Rows of one exchange in columns of text: alpaca, dolly, squad, prompt_completion; and plain documents."""

from __future__ import annotations

from typing import Any

from primus_bridge.data.formats.fields import answer, column, rows_of, text
from primus_bridge.data.formats.turns import finished, read
from primus_bridge.data.messages import Conversation, Message, RowError, Unusable


def alpaca(data: dict[str, Any]) -> Conversation:
    """Columns instruction, output; optional input, system, history (a list of [question, answer])."""
    turns = []
    for i, pair in enumerate(rows_of(data.get("history") or [], "history")):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"history[{i}]", "expected a pair [question, answer]")
        turns.append(Message("user", text(pair[0], f"history[{i}][0]")))
        turns.append(Message("assistant", answer(pair[1], f"history[{i}][1]")))
    turns.append(instruction(data, "input"))
    turns.append(Message("assistant", answer(column(data, "output"), "output")))
    return finished(turns, data)


def dolly(data: dict[str, Any]) -> Conversation:
    """Columns instruction, response; optional context; category is not read."""
    reply = answer(column(data, "response"), "response")
    return finished([instruction(data, "context"), Message("assistant", reply)], data)


def instruction(data: dict[str, Any], context: str) -> Message:
    """The user's turn of column instruction, with the optional column ``context`` beside it."""
    said = text(column(data, "instruction"), "instruction")
    return Message("user", said, text(data.get(context), context, optional=True))


def squad(data: dict[str, Any]) -> Conversation:
    """Columns question, context, and answers ({text: [...]}, a list of {text} or of texts, or a text), of which the
    first counts. Raises Unusable for a question without one, as SQuAD 2 has them."""
    question = Message(
        "user", text(column(data, "question"), "question"), text(data.get("context"), "context", optional=True)
    )
    place, found = "answers", column(data, "answers")
    if isinstance(found, dict):
        place, found = "answers.text", column(found, "text")
    if not found:
        raise Unusable("no_answer")
    if isinstance(found, list):
        place, found = f"{place}[0]", found[0]
        if isinstance(found, dict):
            place, found = f"{place}.text", column(found, "text")
    return finished([question, Message("assistant", answer(found, place))], data)


def prompt_completion(data: dict[str, Any]) -> Conversation:
    """Columns prompt and completion (or response), each a text or a list of messages; optional system and tools."""
    name = "response" if "completion" not in data and "response" in data else "completion"
    turns = side(column(data, "prompt"), "prompt", "user") + side(column(data, name), name, "assistant")
    return finished(turns, data)


def side(value: Any, place: str, role: str) -> list[Message]:
    """One side of an exchange: a text of ``role``, a message of either shape, or a list of such messages."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        keys = ("from", "value") if value and isinstance(value[0], dict) and "from" in value[0] else ("role", "content")
        return read(value, place, *keys)
    return [Message(role, answer(value, place) if role == "assistant" else text(value, place))]


def document(data: dict[str, Any]) -> str:
    """Column text: a document, for pretraining. May be empty (it is then counted and left out)."""
    return text(column(data, "text"), "text")
