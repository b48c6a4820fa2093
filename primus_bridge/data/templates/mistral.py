"""Mistral's instruct format, versions 1, 3 and 3 with tekken. Source: mistral-common, tokens/tokenizers/instruct.py."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from primus_bridge.data.messages import Conversation, RowError, ToolCall
from primus_bridge.data.templates.base import Piece
from primus_bridge.data.templates.own import OwnTemplate, alternating, answer, end, prompt, said, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


class MistralV1(OwnTemplate):
    """``<s> [INST] {user} [/INST] {answer}</s> [INST] ...``, the system text before the first user text.

    The space before a marker or an answer is the one that SentencePiece puts before every text.
    """

    name = "mistral_v1"

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        # written out where the tokenizer itself puts no space after a special token
        self.space = "" if _spaces_after_special(tokenizer) else " "

    def _prepends_bos(self) -> bool:
        return False

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        system, turns = alternating(conversation.messages, self.name)
        pieces = [prompt(self._bos())]
        for i, message in turns:
            if message.role == "assistant":
                pieces += [end(" ", i), answer(message.text, i), end(self._eos(), i)]
                continue
            pieces.append(prompt(self.space + "[INST] ", i))
            if system and i == 1:
                pieces += [said(system, 0), prompt("\n\n", 0)]
            pieces += [said(message.text, i), prompt(" [/INST]", i)]
        return pieces


class MistralV3(OwnTemplate):
    """``<s>[INST] {user}[/INST] {answer}</s>[INST] ...``, the system text and the tools in the last user turn.

    Tools, calls and results are JSON between control tokens. Ids of calls are nine letters and digits; another id
    becomes nine of its hash, and a missing one is made from its place, so that a result finds its call.
    """

    name = "mistral_v3"
    markers = ("[INST]", "[/INST]")
    roles = ("system", "user", "assistant", "tool")
    takes_tools = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        self.space = "" if "[INST]" in tokenizer.get_added_vocab() and _spaces_after_special(tokenizer) else " "

    def control_tokens(self) -> tuple[str, ...]:
        tools = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
        return (*self.markers, *tools)

    def _prepends_bos(self) -> bool:
        return False

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        messages = conversation.messages
        self._check_order(conversation)
        system = messages[0].text if messages[0].role == "system" else ""
        last_user = max(i for i, message in enumerate(messages) if message.role == "user")
        pieces = [prompt(self._bos())]
        open_ids: list[str] = []  # of calls that have no result yet
        for i, message in enumerate(messages):
            if message.role == "user":
                if i == last_user and conversation.tools:
                    pieces += [prompt("[AVAILABLE_TOOLS]" + self.space), said(to_json(_tools(conversation)), -1)]
                    pieces.append(prompt("[/AVAILABLE_TOOLS]"))
                pieces.append(prompt("[INST]" + self.space, i))
                if i == last_user and system:
                    pieces += [said(system, 0), prompt("\n\n", 0)]
                pieces += [said(message.text, i), prompt("[/INST]", i)]
            elif message.role == "assistant" and message.tool_calls:
                if message.text.strip():
                    raise RowError(
                        "content", f"template '{self.name}': turn {i + 1} has an answer beside its tool calls"
                    )
                open_ids = [_call_id(call.id, f"{i}.{k}") for k, call in enumerate(message.tool_calls)]
                calls = [_call(call, call_id) for call, call_id in zip(message.tool_calls, open_ids, strict=True)]
                pieces += [end("[TOOL_CALLS]" + self.space, i), answer(to_json(calls), i), end(self._eos(), i)]
            elif message.role == "assistant":
                pieces += [end(self.space, i), answer(message.text.rstrip(" "), i), end(self._eos(), i)]
            elif message.role == "tool":
                call_id = _call_id(message.tool_call_id, "") if message.tool_call_id else (open_ids or [""])[0]
                if call_id not in open_ids:
                    raise RowError("tool_call_id", f"turn {i + 1} answers no call before it; give it the id of one")
                open_ids.remove(call_id)
                result = to_json({"content": _parsed(message.text), "call_id": call_id})
                pieces += [prompt("[TOOL_RESULTS]" + self.space, i), said(result, i), prompt("[/TOOL_RESULTS]", i)]
        return pieces

    def _check_order(self, conversation: Conversation) -> None:
        """mistral-common's order: user, (calls, their results)*, answer, user, ..."""
        roles = ["calls" if message.tool_calls else message.role for message in conversation.messages]
        text = " ".join(roles) + " "
        if not re.fullmatch(r"(system )?(user (calls (tool )+)*(assistant |calls ))+", text):
            raise RowError(
                "role", f"template '{self.name}' needs user and assistant turns that alternate, found {text}"
            )


class MistralTekken(MistralV3):
    """Version 3 with the byte-level tokenizer tekken: no spaces after control tokens."""

    name = "mistral_tekken"

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        self.space = ""


def _spaces_after_special(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether this tokenizer itself puts a space before a text that follows a special token (a legacy Llama does)."""
    special = tokenizer.bos_token or tokenizer.eos_token or ""
    return tokenizer.tokenize(special + "a", add_special_tokens=False)[-1].startswith("▁")


def _tools(conversation: Conversation) -> list[dict[str, Any]]:
    """The definitions in the order of fields that mistral-common writes."""
    out = []
    for tool in conversation.tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("tools", 'a tool needs a name: {"type": "function", "function": {"name": ..., ...}}')
        fields = {
            "name": function["name"],
            "description": function.get("description", ""),
            "parameters": function.get("parameters", {}),
        }
        out.append({"type": "function", "function": fields})
    return out


def _call(call: ToolCall, call_id: str) -> dict[str, Any]:
    return {"name": call.name, "arguments": _parsed(call.arguments), "id": call_id}


def _parsed(value: Any) -> Any:
    """What JSON text says; other text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _call_id(given: str, place: str) -> str:
    if CALL_ID.fullmatch(given):
        return given
    return hashlib.sha256((given or place).encode()).hexdigest()[:9]
