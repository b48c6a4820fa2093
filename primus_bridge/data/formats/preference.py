"""Preference pairs for DPO: a prompt with a chosen and a rejected answer, as TRL and LLaMA-Factory write them."""

from __future__ import annotations

from typing import Any, NamedTuple

from primus_bridge.data.formats.fields import column
from primus_bridge.data.formats.instruction import instruction, side
from primus_bridge.data.formats.turns import finished
from primus_bridge.data.messages import Conversation, Message, RowError, Unusable


class Preference(NamedTuple):
    prompt: list[Message]
    """Ends with a user's or a tool's turn."""
    chosen: list[Message]
    rejected: list[Message]
    tools: tuple[dict[str, Any], ...] = ()


def pairs(data: dict[str, Any]) -> Preference:
    """Columns chosen and rejected: texts, messages, or lists of messages; and the prompt: columns prompt (a text or a
    list of messages), conversations or messages, instruction (with input), or what both lists begin with.

    Raises RowError, and Unusable when an answer is empty.
    """
    prompt, chosen, rejected = _sides(data)
    whole = finished([*prompt, chosen[0]], data)
    return Preference(whole.messages[:-1], chosen, rejected, whole.tools)


def preference(data: dict[str, Any]) -> Conversation:
    """The row's columns as in ``pairs``; for SFT: the prompt and the chosen answer."""
    prompt, chosen, _ = _sides(data)
    return finished([*prompt, *chosen], data)


def _sides(data: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected), of which the prompt does not end with an answer, and the others begin with one."""
    chosen, rejected = (side(column(data, name), name, "assistant") for name in ("chosen", "rejected"))
    if not chosen or not rejected:
        raise Unusable("no_answer")
    if chosen[0].role != "assistant" or rejected[0].role != "assistant":
        shared = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise RowError("rejected", "does not begin with the prompt that 'chosen' begins with; give both the same")
        for name, reply in (("chosen", chosen), ("rejected", rejected)):
            if reply[0].role != "assistant":
                raise RowError(name, f"must go on with an assistant's turn after the prompt, not the {reply[0].role}'s")
    else:
        prompt = _prompt(data)
    if prompt[-1].role not in ("user", "tool"):
        raise RowError("prompt", f"ends with a turn of the {prompt[-1].role}; it must end with the user's")
    return prompt, chosen, rejected


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many turns both begin with: the prompt. Where the answers begin alike too, it ends before those."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    while count and chosen[count - 1].role == "assistant":
        count -= 1
    return count


def _prompt(data: dict[str, Any]) -> list[Message]:
    for name in ("prompt", "conversations", "messages"):
        if data.get(name):
            return side(data[name], name, "user")
    if "instruction" in data:
        return [instruction(data, "input")]
    raise RowError("prompt", "missing: there is no column prompt, conversations or instruction; add one")
