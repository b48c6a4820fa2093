"""The mistral templates against mistral-common, which is the family's own definition: the same ids."""

from __future__ import annotations

import re

import pytest
from mistral_common.protocol.instruct import messages as protocol
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool
from mistral_common.protocol.instruct.tool_calls import ToolCall as ProtocolCall

from primus_bridge.data.messages import Conversation, Message, RowError, ToolCall
from primus_bridge.data.templates.own import to_json

from . import real_tokenizers
from .conversations import CONVERSATIONS, MANY_TOOLS, ROUND, TOOLS, supervised
from .encoding import conversation_of, encode, render

MULTI = [
    Message("system", "Be kind and brief."),
    Message("user", "Hello there"),
    Message("assistant", "Hello. What is it?"),
    Message("user", "  two spaces, and 漢字 😀\n\nthen more "),
    Message("assistant", "\tIt is that. "),
]
SHAPES = {**CONVERSATIONS, "spaces": MULTI}


@pytest.fixture(scope="module")
def tekken(tmp_path_factory):
    return real_tokenizers.load_tekken(tmp_path_factory.mktemp("tekken"))


@pytest.fixture(scope="module", params=[False, True], ids=["first", "legacy"])
def sentencepiece(request, tmp_path_factory):
    """load(version): both ways in which the published tokenizers put spaces."""

    def load(version):
        folder = tmp_path_factory.mktemp(version)
        return real_tokenizers.load_sentencepiece(version, folder, legacy=request.param)

    return {version: load(version) for version in ("v1", "v3")}


def mistral_ids(tokenizer, of) -> list[int]:
    of = conversation_of(of)
    turns = []
    for message in of.messages:
        calls = [
            ProtocolCall(id=c.id, function=FunctionCall(name=c.name, arguments=to_json(c.arguments)))
            for c in message.tool_calls
        ]
        turns.append(
            {
                "system": lambda m, _: protocol.SystemMessage(content=m.content),
                "user": lambda m, _: protocol.UserMessage(content=m.content),
                "assistant": lambda m, calls: protocol.AssistantMessage(
                    content=m.content or None, tool_calls=calls or None
                ),
                "tool": lambda m, _: protocol.ToolMessage(content=m.content, tool_call_id=m.tool_call_id, name=m.name),
            }[message.role](message, calls)
        )
    tools = [Tool(function=Function(**tool["function"])) for tool in of.tools]
    return tokenizer.encode_chat_completion(ChatCompletionRequest(messages=turns, tools=tools or None)).tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_sentencepiece_ids(sentencepiece, version, shape):
    """Runs of spaces are left out: transformers' conversion of a tokenizer.model merges them in another order."""
    tokenizer = sentencepiece[version]
    messages = [message._replace(content=re.sub("  +", " ", message.content).strip(" ")) for message in SHAPES[shape]]
    ids, _ = encode(tokenizer, messages, f"mistral_{version}")
    assert ids == mistral_ids(real_tokenizers.mistral_sentencepiece(version), messages)


@pytest.mark.parametrize("shape", SHAPES)
def test_tekken_ids(tekken, shape):
    ids, _ = encode(tekken[0], SHAPES[shape], "mistral_tekken")
    assert ids == mistral_ids(tekken[1], SHAPES[shape])


@pytest.mark.parametrize("of", [TOOLS, MANY_TOOLS], ids=["a round", "rounds"])
def test_tools(sentencepiece, tekken, of):
    ids, _ = encode(sentencepiece["v3"], of, "mistral_v3")
    assert ids == mistral_ids(real_tokenizers.mistral_sentencepiece("v3"), of)
    ids, _ = encode(tekken[0], of, "mistral_tekken")
    assert ids == mistral_ids(tekken[1], of)


def test_what_is_learnt_of_tools(tekken):
    rendered = render(tekken[0], TOOLS, "mistral_tekken")
    assert supervised(rendered) == (
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}, "id": "abcdefgh1"}]</s>'
        "The sky is clear.</s>"
    )
    assert [(p.turn, p.text) for p in rendered.pieces][:3] == [
        (-1, "<s>"),
        (-1, "[AVAILABLE_TOOLS]"),
        (-1, to_json(list(TOOLS.tools))),
    ]


def test_mistral_is_version_3(sentencepiece):
    tokenizer = sentencepiece["v3"]
    assert encode(tokenizer, MULTI, "mistral")[0] == encode(tokenizer, MULTI, "mistral_v3")[0]


def test_ids_of_calls(tekken):
    """An id that is not nine letters and digits, or none at all: a result still names its call."""
    for call_id in ("call_123456789012", ""):
        turns = [
            Message("user", "How is it?"),
            Message("assistant", tool_calls=(ToolCall("look", {"a": 1}, call_id), ToolCall("look", {"a": 2}, ""))),
            Message("tool", "1", tool_call_id=call_id),
            Message("tool", "2"),
            Message("assistant", "fine"),
        ]
        text = "".join(piece.text for piece in render(tekken[0], turns, "mistral_tekken").pieces)
        made = [part[:9] for part in text.split('id": "')[1:]]
        assert made[:2] == made[2:] and made[0] != made[1] and all(i.isalnum() and len(i) == 9 for i in made)


@pytest.mark.parametrize(
    ("turns", "column"),
    [
        ([ROUND[0], ROUND[1], Message("assistant", "clear")], "role"),
        ([ROUND[0], ROUND[1]._replace(content="Let me see."), *ROUND[2:]], "content"),
        ([*ROUND[:2], ROUND[2]._replace(tool_call_id="zzzzzzzz9"), ROUND[3]], "tool_call_id"),
        ([Message("user", "a"), Message("assistant", "b", thinking="c")], "thinking"),
    ],
)
def test_what_the_family_has_no_place_for(tekken, turns, column):
    with pytest.raises(RowError) as caught:
        render(tekken[0], Conversation(turns), "mistral_tekken")
    assert caught.value.column == column


def test_version_1_has_no_tools(sentencepiece):
    with pytest.raises(RowError, match="no place for tool definitions"):
        render(sentencepiece["v1"], TOOLS, "mistral_v1")
