"""DeepSeek V3 and R1: full-width markers, tool calls as fenced JSON, the thought before the last answer."""

from __future__ import annotations

from primus_bridge.data.messages import Conversation, RowError
from primus_bridge.data.templates.base import Piece
from primus_bridge.data.templates.own import OwnTemplate, answer, arguments_text, end, prompt, said, split_thought

END = "<｜end▁of▁sentence｜>"
OUTPUTS_END = "<｜tool▁outputs▁end｜>"


class DeepSeek(OwnTemplate):
    """DeepSeek-V3's and R1's chat_template. Source: deepseek-ai/DeepSeek-R1, tokenizer_config.json.

    System texts stand before the first turn. Thoughts are printed in the last turn only; its ``<think>`` is the
    prompt's (R1's generation prompt holds it), the thought and ``</think>`` are the model's. The published text loses
    the opening marker of a second round of tool calls; here every round has it. Tool definitions have no place.
    """

    name = "deepseek"
    markers = (
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁outputs▁begin｜>",
        "<｜tool▁output▁begin｜>",
        "<｜tool▁output▁end｜>",
        OUTPUTS_END,
        END,
    )
    roles = ("system", "user", "assistant", "tool")
    takes_tools = takes_thinking = True

    def _prepends_bos(self) -> bool:
        return False

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        if conversation.tools:
            raise RowError(
                "tools", "template 'deepseek' has no place for tool definitions; write them in the system text"
            )
        messages = conversation.messages
        pieces = [prompt(self._bos())]
        systems = [i for i, message in enumerate(messages) if message.role == "system"]
        for i in systems:
            pieces += [prompt("\n\n" if i != systems[0] else "", i), said(messages[i].text, i)]
        for i, message in enumerate(messages):
            previous = messages[i - 1].role if i else ""
            if message.role == "user":
                pieces += [prompt("<｜User｜>", i), said(message.text, i)]
            elif message.role == "tool":
                begin = "" if previous == "tool" else "<｜tool▁outputs▁begin｜>"
                pieces += [prompt(begin + "<｜tool▁output▁begin｜>", i), said(message.text, i)]
                pieces.append(prompt("<｜tool▁output▁end｜>", i))
            elif message.role == "assistant":
                thought, content = split_thought(message)
                pieces.append(prompt(OUTPUTS_END if previous == "tool" else "<｜Assistant｜>", i))
                if thought and i == len(messages) - 1:
                    pieces += [prompt("<think>\n", i), answer(thought, i), end("\n</think>\n\n", i)]
                pieces += [answer(content, i), *_calls(message.tool_calls, i), end(END, i)]
        return pieces


def _calls(calls, turn: int) -> list[Piece]:
    pieces = []
    for k, call in enumerate(calls):
        before = "\n" if k else "<｜tool▁calls▁begin｜>"
        pieces += [end(before + "<｜tool▁call▁begin｜>function<｜tool▁sep｜>", turn), answer(call.name, turn)]
        pieces += [end("\n```json\n", turn), answer(arguments_text(call), turn), end("\n```<｜tool▁call▁end｜>", turn)]
    return [*pieces, end("<｜tool▁calls▁end｜>", turn)] if calls else []
