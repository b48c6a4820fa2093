"""Conversations of every shape for the tests of templates, and what transformers makes of one."""

from __future__ import annotations

from primus_bridge.data.messages import Conversation, Message, ToolCall

from .encoding import conversation_of

ONE = [Message("user", "What is the capital of France?"), Message("assistant", "Paris is the capital.")]
TWO = [
    Message("system", "Be kind and brief."),
    *ONE,
    Message("user", "And five?"),
    Message("assistant", "the answer is six"),
]
ODD = [
    Message("user", "Größe 😀 漢字\r\nline two\n\n\n  indented"),
    Message("assistant", "def f(x):\n    return x + 1\n\n\nprint(f(2))  # 三 🎉"),
    Message("user", "a"),
    Message("assistant", "I"),
]
CONVERSATIONS = {"one": ONE, "two turns and system": TWO, "odd characters": ODD}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, «today»",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(city: str, call_id: str) -> ToolCall:
    return ToolCall("get_weather", {"city": city, "days": 2}, call_id)


def result(text: str, call_id: str) -> Message:
    return Message("tool", text, name="get_weather", tool_call_id=call_id)


ROUND = [
    Message("user", "How is the weather in Zürich?"),
    Message("assistant", tool_calls=(call("Zürich", "abcdefgh1"),)),
    result('{"sky": "clear"}', "abcdefgh1"),
    Message("assistant", "The sky is clear."),
]
TOOLS = Conversation([Message("system", "Be kind and brief."), *ROUND], tools=(TOOL,))
MANY_TOOLS = Conversation(
    [
        *ROUND,
        Message("user", "And in Rome and in 京都?"),
        Message("assistant", tool_calls=(call("Rome", "abcdefgh2"), call("京都", "abcdefgh3"))),
        result("[1, 2]", "abcdefgh2"),
        result('{"sky": "rain"}', "abcdefgh3"),
        Message("assistant", tool_calls=(call("Oslo", "abcdefgh4"),)),
        result('{"sky": "snow"}', "abcdefgh4"),
        Message("assistant", "Rome is warm, 京都 is wet."),
    ],
    tools=(TOOL, TOOL),
)


def text_of(rendered, tokenizer) -> str:
    bos = tokenizer.bos_token if rendered.bos else ""
    return bos + "".join(piece.text for piece in rendered.pieces)


def supervised(rendered) -> str:
    return "".join(piece.text for piece in rendered.pieces if piece.supervised)


def openai(of, *, arguments=dict) -> dict:
    """What apply_chat_template takes: the turns, and the tools where there are some."""
    of = conversation_of(of)
    turns = []
    for message in of.messages:
        turn = {"role": message.role, "content": message.content}
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            turn["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": arguments(c.arguments)}}
                for c in message.tool_calls
            ]
        if message.role == "tool":
            turn |= {"name": message.name, "tool_call_id": message.tool_call_id}
        turns.append(turn)
    return {"conversation": turns, "tools": list(of.tools) or None}


def official(tokenizer, of, **options) -> list[int]:
    return tokenizer.apply_chat_template(**openai(of), tokenize=True, return_dict=False, **options)


def official_text(tokenizer, of, *, arguments=dict, **options) -> str:
    return tokenizer.apply_chat_template(**openai(of, arguments=arguments), tokenize=False, **options)


def answers(messages, end: str, before: str = "") -> str:
    return "".join(before + m.content.strip() + end for m in messages if m.role == "assistant")
