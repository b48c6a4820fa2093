"""Qwen 2.5 and Qwen 3: ChatML with tools as JSON in tags, and Qwen 3's thoughts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from primus_bridge.data.messages import Conversation, Message, RowError
from primus_bridge.data.templates.base import Piece
from primus_bridge.data.templates.own import (
    OwnTemplate,
    answer,
    arguments_text,
    end,
    prompt,
    said,
    split_thought,
    to_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


class Qwen25(OwnTemplate):
    """Qwen2.5-Instruct's chat_template (Qwen 2's without tools). Source: its tokenizer_config.json."""

    name = "qwen2.5"
    markers = ("<|im_start|>", "<|im_end|>")
    roles = ("system", "user", "assistant", "tool")
    takes_tools = True
    default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        messages = conversation.messages
        pieces = self._system(conversation)
        for i, message in enumerate(messages):
            if message.role == "assistant":
                pieces.append(prompt("<|im_start|>assistant\n", i))
                content = self._thought(messages, i, pieces)
                pieces += [answer(content, i), *self._calls(message, i, after=content)]
                pieces += [end("<|im_end|>", i), prompt("\n", i)]
            elif message.role == "tool":
                first = i == 0 or messages[i - 1].role != "tool"
                last = i == len(messages) - 1 or messages[i + 1].role != "tool"
                pieces += [prompt(("<|im_start|>user" if first else "") + "\n<tool_response>\n", i)]
                pieces += [said(message.text, i), prompt("\n</tool_response>" + ("<|im_end|>\n" if last else ""), i)]
            elif message.role == "user" or i:
                pieces += [prompt(f"<|im_start|>{message.role}\n", i), said(message.text, i)]
                pieces.append(prompt("<|im_end|>\n", i))
        return pieces

    def _system(self, conversation: Conversation) -> list[Piece]:
        first, turn = conversation.messages[0], -1
        content = prompt(self.default_system)
        if first.role == "system":
            turn, content = 0, said(first.text, 0)
        elif not conversation.tools and not self.default_system:
            return []
        pieces = [prompt("<|im_start|>system\n", turn), content]
        if conversation.tools:
            # Qwen 2.5 has the blank line after any system text, Qwen 3 after a given one
            pieces.append(prompt(("\n\n" if turn == 0 or self.default_system else "") + TOOLS_BEFORE))
            for tool in conversation.tools:
                pieces += [prompt("\n"), said(to_json(tool), -1)]
            pieces.append(prompt(TOOLS_AFTER))
        return [*pieces, prompt("<|im_end|>\n", turn)]

    def _thought(self, messages: list[Message], i: int, pieces: list[Piece]) -> str:
        """The answer without its thought, which is appended to ``pieces`` where the family prints one."""
        return messages[i].text

    def _calls(self, message: Message, turn: int, *, after: str) -> list[Piece]:
        pieces = []
        for call in message.tool_calls:
            pieces += [end(("\n" if after else "") + '<tool_call>\n{"name": "', turn), answer(call.name, turn)]
            pieces += [end('", "arguments": ', turn), answer(self._arguments(call), turn), end("}\n</tool_call>", turn)]
            after = call.name
        return pieces

    def _arguments(self, call) -> str:
        return to_json(call.arguments)


class Qwen3(Qwen25):
    """Qwen3's chat_template. Source: Qwen/Qwen3-8B, tokenizer_config.json.

    Thoughts are printed after the last question only; the last answer without one gets an empty thought. Supervised is
    a thought with its tags; the empty one is not: Qwen's own switch (``enable_thinking: false``) puts it in the prompt.
    """

    name = "qwen3"
    takes_thinking = True
    default_system = ""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, enable_thinking: bool | None = None):
        super().__init__(tokenizer)
        self.enable_thinking = enable_thinking

    def _thought(self, messages: list[Message], i: int, pieces: list[Piece]) -> str:
        thought, content = split_thought(messages[i])
        if i <= _last_question(messages):
            return content
        if thought and self.enable_thinking is False:
            raise RowError("thinking", f"turn {i + 1} has a thought, and enable_thinking is false; remove one of them")
        if thought:
            pieces += [end("<think>\n", i), answer(thought, i), end("\n</think>\n\n", i)]
            return content.lstrip("\n")
        if i == len(messages) - 1:
            pieces.append(prompt("<think>\n\n</think>\n\n", i))
            return content.lstrip("\n")
        return content

    def _arguments(self, call) -> str:
        return arguments_text(call)


def _last_question(messages: list[Message]) -> int:
    """Index of the last user turn that is no tool's answer written as one."""
    for i in range(len(messages) - 1, -1, -1):
        text = messages[i].text
        wrapped = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if messages[i].role == "user" and not wrapped:
            return i
    return len(messages) - 1
