"""Our own templates, byte for byte, against the chat templates that the families publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from primus_bridge.data.messages import Conversation, Message, RowError
from primus_bridge.data.templates.own import to_json

from . import families
from .conversations import (
    CONVERSATIONS,
    MANY_TOOLS,
    ROUND,
    TOOLS,
    TWO,
    answers,
    official,
    official_text,
    supervised,
    text_of,
)
from .encoding import encode, render, supervised_text

PUBLISHED = Path(__file__).parent / "chat_templates"
SPACES = [
    Message("system", " Be kind. \n"),
    Message("user", "  two and two? \n"),
    Message("assistant", "\nfour  "),
    Message("user", "\n"),
    Message("assistant", " ok"),
]
SAME_ROLE = [Message("user", "a"), Message("user", "b"), Message("assistant", "c"), Message("assistant", "d")]
SHAPES = {**CONVERSATIONS, "outer spaces": SPACES, "same role twice": SAME_ROLE}

# ours, the published text, a tokenizer of the kind, the end of turn that is learnt
FAMILIES = {
    "zephyr": ("zephyr", lambda text: families.llama2(template=text), "</s>"),
    "phi3": ("phi3", families.phi3, "<|end|>"),
    "gemma": ("gemma3", families.gemma, "<end_of_turn>"),
    "llama3": ("llama3", families.llama3, "<|eot_id|>"),
    "qwen2.5": ("qwen2_5", families.qwen, "<|im_end|>"),
    "qwen2": ("qwen2_5", families.qwen, "<|im_end|>"),
    "qwen3": ("qwen3", families.qwen, "<|im_end|>"),
    "deepseek": ("deepseek_v3", families.deepseek, "<｜end▁of▁sentence｜>"),
}
ALTERNATES = ("gemma",)
STRIPS = ("gemma", "llama3")


def published(name: str):
    file, build, end = FAMILIES[name]
    return build((PUBLISHED / f"{file}.jinja").read_text()), end


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_its_published_template(name, shape):
    tokenizer, end = published(name)
    messages = SHAPES[shape]
    if name in ALTERNATES and messages is SAME_ROLE:
        with pytest.raises(RowError, match="alternate"):
            render(tokenizer, messages, name)
        return
    rendered = render(tokenizer, messages, name)
    # Zephyr's text has no BOS: its tokenizer adds it, as ours is left to
    bos = [tokenizer.bos_token_id] if rendered.bos else []
    assert text_of(rendered, tokenizer) == tokenizer.decode(bos) + official_text(tokenizer, messages)
    ids, weights = encode(tokenizer, messages, name)
    if messages is not SPACES:  # there a newline before the answer would be one token with the header's
        assert ids == bos + official(tokenizer, messages)
    said = [m.content.strip() if name in STRIPS else m.content for m in messages if m.role == "assistant"]
    if name == "qwen3":  # as published: newlines before the last answer go
        said[-1] = said[-1].lstrip("\n")
    assert supervised(rendered) == "".join(text + end for text in said)
    assert supervised_text(tokenizer, ids, weights) == supervised(rendered)


@pytest.mark.parametrize("shape", ["one", "odd characters"])
def test_gemma_without_a_system_is_gemma_2s(shape):
    tokenizer = families.gemma((PUBLISHED / "gemma2.jinja").read_text())
    assert encode(tokenizer, SHAPES[shape], "gemma")[0] == official(tokenizer, SHAPES[shape])


@pytest.mark.parametrize("of", [TOOLS, MANY_TOOLS], ids=["a round", "rounds"])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_qwens_tools(name, of):
    tokenizer, end = published(name)
    rendered = render(tokenizer, of, name)
    assert text_of(rendered, tokenizer) == official_text(tokenizer, of)
    assert encode(tokenizer, of, name)[0] == official(tokenizer, of)
    said = ""
    for message in of.messages:
        if message.role == "assistant":
            calls = (
                f'<tool_call>\n{{"name": "{c.name}", "arguments": {to_json(c.arguments)}}}\n</tool_call>'
                for c in message.tool_calls
            )
            said += message.content + "\n".join(calls) + end
    assert supervised(rendered) == said


def test_an_answer_and_a_call_in_one_turn():
    turns = [ROUND[0], ROUND[1]._replace(content="Let me see."), *ROUND[2:]]
    for name in ("qwen2.5", "qwen3"):
        tokenizer, end = published(name)
        assert text_of(render(tokenizer, turns, name), tokenizer) == official_text(tokenizer, turns)
    tokenizer, end = published("deepseek")
    assert text_of(render(tokenizer, turns, "deepseek"), tokenizer) == official_text(
        tokenizer, turns, arguments=to_json
    )


def test_deepseeks_calls():
    tokenizer, end = published("deepseek")
    two_calls = [ROUND[0], MANY_TOOLS.messages[5], *MANY_TOOLS.messages[6:8], MANY_TOOLS.messages[-1]]
    for turns in (ROUND, two_calls):
        rendered = render(tokenizer, turns, "deepseek")
        assert text_of(rendered, tokenizer) == official_text(tokenizer, turns, arguments=to_json)
    assert supervised(render(tokenizer, ROUND, "deepseek")) == (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Zürich", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + end + "The sky is clear." + end
    )
    with pytest.raises(RowError, match="tool definitions"):
        render(tokenizer, TOOLS, "deepseek")


THOUGHT = [
    Message("user", "two and three?"),
    Message("assistant", "five", thinking="add them"),
    Message("user", "three and three?"),
    Message("assistant", "six", thinking="add\nagain"),
]
INLINE = [
    m._replace(content=f"<think>\n{m.thinking}\n</think>\n\n{m.content}", thinking="") if m.thinking else m
    for m in THOUGHT
]


@pytest.mark.parametrize("thinking", [None, True])
def test_qwen3s_thoughts(thinking):
    tokenizer, end = published("qwen3")
    rendered = render(tokenizer, THOUGHT, "qwen3", enable_thinking=thinking)
    assert text_of(rendered, tokenizer) == official_text(tokenizer, THOUGHT)
    assert supervised(rendered) == f"five{end}<think>\nadd\nagain\n</think>\n\nsix{end}"
    assert render(tokenizer, INLINE, "qwen3").pieces == rendered.pieces
    assert text_of(rendered, tokenizer) == official_text(tokenizer, INLINE)


def test_qwen3s_thoughts_between_tool_calls():
    tokenizer, _ = published("qwen3")
    turns = [
        m._replace(thinking=f"thought [{i}]") if m.role == "assistant" else m for i, m in enumerate(MANY_TOOLS.messages)
    ]
    of = Conversation(turns, tools=MANY_TOOLS.tools)
    rendered = render(tokenizer, of, "qwen3")
    assert text_of(rendered, tokenizer) == official_text(tokenizer, of)
    assert [part in supervised(rendered) for part in ("[1]", "[5]", "[8]", "[10]")] == [
        False,
        True,
        True,
        True,
    ]


def test_qwen3s_empty_thought_is_the_prompts():
    tokenizer, end = published("qwen3")
    for thinking in (None, True, False):
        rendered = render(tokenizer, TWO, "qwen3", enable_thinking=thinking)
        assert supervised(rendered) == answers(TWO, end)
        prompt = official_text(tokenizer, TWO[:-1], add_generation_prompt=True, enable_thinking=False)
        assert text_of(rendered, tokenizer).startswith(prompt)
    with pytest.raises(RowError, match="enable_thinking is false"):
        render(tokenizer, THOUGHT, "qwen3", enable_thinking=False)


def test_deepseeks_thought_follows_the_generation_prompt():
    tokenizer, end = published("deepseek")
    rendered = render(tokenizer, THOUGHT, "deepseek")
    prompt = official_text(tokenizer, THOUGHT[:-1], add_generation_prompt=True)
    assert text_of(rendered, tokenizer) == prompt + f"add\nagain\n</think>\n\nsix{end}"
    assert supervised(rendered) == f"five{end}add\nagain\n</think>\n\nsix{end}"


def test_vicuna_is_fastchats():
    """fastchat/conversation.py, vicuna_v1.1: SeparatorStyle.ADD_COLON_TWO, sep ' ', sep2 '</s>'."""
    tokenizer = families.llama2()
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    for messages in CONVERSATIONS.values():
        text, turns = system, list(messages)
        if turns[0].role == "system":
            text = turns.pop(0).content
        text += " "
        for i, turn in enumerate(turns):
            text += ("USER", "ASSISTANT")[i % 2] + ": " + turn.content + (" ", "</s>")[i % 2]
        rendered = render(tokenizer, messages, "vicuna")
        assert text_of(rendered, tokenizer) == "<s>" + text
        # generation is prompted with "ASSISTANT:", so the space is the answer's
        assert supervised(rendered) == answers(messages, "</s>", before=" ")


@pytest.mark.parametrize("context", ["", "Paris is in France."])
def test_dolly_is_databricks_prompt(context):
    """databrickslabs/dolly, training/consts.py: PROMPT_NO_INPUT_FORMAT and PROMPT_WITH_INPUT_FORMAT."""
    tokenizer = families.llama3()
    messages = [Message("user", "Where is Paris?", context), Message("assistant", "In France.")]
    intro = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    given = f"Input:\n{context}\n\n" if context else ""
    text = f"{intro}\n\n### Instruction:\nWhere is Paris?\n\n{given}### Response:\nIn France.\n\n### End"
    rendered = render(tokenizer, messages, "dolly")
    assert text_of(rendered, tokenizer) == f"<|begin_of_text|>{text}<|eot_id|>"
    assert supervised(rendered) == "In France.\n\n### End<|eot_id|>"
    own = families.dolly()
    ids, weights = encode(own, messages, "dolly")
    assert own.decode(ids) == text and ids[-1] == own.convert_tokens_to_ids("### End")
    assert supervised_text(own, ids, weights) == "In France.\n\n### End"


NO_PLACE = {
    "alpaca": families.llama3,
    "dolly": families.llama3,
    "chatml": families.qwen,
    "llama2": families.llama2,
    "llama3": families.llama3,
    "vicuna": families.llama2,
    "zephyr": families.llama2,
    "phi3": families.phi3,
    "gemma": families.gemma,
}


@pytest.mark.parametrize("name", NO_PLACE)
def test_what_a_family_has_no_place_for_is_never_dropped(name):
    tokenizer = NO_PLACE[name]()
    rows = {
        "tools": Conversation([Message("user", "a"), Message("assistant", "b")], tools=TOOLS.tools),
        "tool_calls": Conversation(ROUND[:2]),
        "role": Conversation([ROUND[0], ROUND[3], *ROUND[2:]]),
        "thinking": Conversation([Message("user", "a"), Message("assistant", "b", thinking="c")]),
    }
    for column, row in rows.items():
        with pytest.raises(RowError, match=f"'{name}' has no place for") as caught:
            render(tokenizer, row, name)
        assert caught.value.column == column
    if name != "qwen2.5":
        with pytest.raises(RowError, match="no place for thoughts"):
            render(families.qwen(), THOUGHT, "qwen2.5")
