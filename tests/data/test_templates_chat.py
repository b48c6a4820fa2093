"""The tokenizer's chat template with tools, calls and thoughts: the published texts, and what is found in them."""

from __future__ import annotations

import datetime
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from primus_bridge.data.messages import Conversation, Message, RowError
from primus_bridge.data.templates.own import to_json

from . import families
from .conversations import MANY_TOOLS, ROUND, TOOLS, TWO, official_text, supervised, text_of
from .encoding import conversation_of, encode, render, supervised_text, template_of

PUBLISHED = Path(__file__).parent / "chat_templates"
WEATHER = [Message("user", "How is it?"), *ROUND[1:]]
CALL = '{"city": "Zürich", "days": 2}'
HERMES_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {CALL}}}\n</tool_call><|im_end|>'
HERMES = HERMES_CALL + "The sky is clear.<|im_end|>"
LLAMA = f'{{"name": "get_weather", "parameters": {CALL}}}<|eot_id|>The sky is clear.<|eot_id|>'
MISTRAL = f'[{{"name": "get_weather", "arguments": {CALL}, "id": "abcdefgh1"}}]'
DEEPSEEK = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{CALL}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>The sky is clear.<｜end▁of▁sentence｜>"
)


def with_template(build, file: str):
    return build(template=(PUBLISHED / f"{file}.jinja").read_text())


# file, tokenizer of the kind, what is learnt of a call, its result and the answer
CALLS = {
    "qwen2_5": (families.qwen, HERMES),
    "qwen3": (families.qwen, HERMES),
    "llama3_1": (families.llama3, LLAMA),
    "llama3_2": (families.llama3, LLAMA),
    "mistral_v0_3": (families.llama2, f"[TOOL_CALLS] {MISTRAL}</s> The sky is clear.</s>"),
    "mistral_nemo": (families.llama2, f"[TOOL_CALLS]{MISTRAL}</s>The sky is clear.</s>"),
    "deepseek_v3": (families.deepseek, DEEPSEEK),
}


@pytest.mark.parametrize("file", CALLS)
def test_a_call_is_learnt_to_its_end_of_turn(file):
    build, expected = CALLS[file]
    tokenizer = with_template(build, file)
    of = Conversation(WEATHER, tools=TOOLS.tools)
    rendered = render(tokenizer, of, "chat_template")
    arguments = to_json if file == "deepseek_v3" else dict
    today = datetime.date.today().strftime("%d %b %Y")  # which Llama 3.2 prints
    expected_text = official_text(tokenizer, of, arguments=arguments).replace(today, "26 Jul 2024")
    assert text_of(rendered, tokenizer) == expected_text
    assert supervised(rendered) == expected
    ids, weights = encode(tokenizer, of, "chat_template")
    assert supervised_text(tokenizer, ids, weights) == expected
    turns = {piece.turn for piece in rendered.pieces if piece.supervised}
    assert turns == {1, 3}


@pytest.mark.parametrize("file", ["qwen2_5", "qwen3"])
def test_rounds_of_calls(file):
    tokenizer = with_template(families.qwen, file)
    own = {"qwen2_5": "qwen2.5", "qwen3": "qwen3"}[file]
    rendered = render(tokenizer, MANY_TOOLS, "chat_template")
    assert text_of(rendered, tokenizer) == official_text(tokenizer, MANY_TOOLS)
    assert supervised(rendered) == supervised(render(tokenizer, MANY_TOOLS, own))
    assert by_turn(rendered) == by_turn(render(tokenizer, MANY_TOOLS, own))


def by_turn(rendered) -> list[str]:
    """The text of each turn but the results, headers and ends included."""
    turns = [i for i, message in enumerate(MANY_TOOLS.messages) if message.role != "tool"]
    return ["".join(piece.text for piece in rendered.pieces if piece.turn == i) for i in turns]


def test_a_conversation_that_ends_with_a_call():
    tokenizer = with_template(families.qwen, "qwen3")
    of = Conversation(WEATHER[:2], tools=TOOLS.tools)
    rendered = render(tokenizer, of, "chat_template")
    assert text_of(rendered, tokenizer) == official_text(tokenizer, of)
    assert supervised(rendered) == HERMES_CALL


def test_a_control_token_in_a_call_is_text():
    tokenizer = with_template(families.qwen, "qwen2_5")
    spoof = ROUND[1].tool_calls[0]._replace(arguments={"city": "Bern<|im_end|>", "<|im_start|>": 1})
    of = Conversation([ROUND[0], ROUND[1]._replace(tool_calls=(spoof,)), *ROUND[2:]], tools=TOOLS.tools)
    rendered = render(tokenizer, of, "chat_template")
    assert text_of(rendered, tokenizer) == official_text(tokenizer, of)
    assert '"city": "Bern<|im_end|>", "<|im_start|>": 1}}\n</tool_call><|im_end|>The sky' in supervised(rendered)
    ids, weights = encode(tokenizer, of, "chat_template")
    assert ids.count(tokenizer.eos_token_id) == 5  # system, user, call, result, answer
    assert supervised_text(tokenizer, ids, weights) == supervised(rendered)


@pytest.mark.parametrize("name", ["chat_template", "deepseek"])
def test_a_marker_with_full_width_bars_in_the_data_is_text(name):
    tokenizer = with_template(families.deepseek_added, "deepseek_v3")
    spoof = "".join(families.DEEPSEEK_MARKS)
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in families.DEEPSEEK_MARKS}
    assert len(marks) == len(tokenizer(spoof, add_special_tokens=False).input_ids)

    def encoded(more: str) -> tuple[list[int], str]:
        turns = [Message("user", f"ask{more}"), *WEATHER[1:-1], Message("assistant", f"clear{more} sky")]
        ids, weights = encode(tokenizer, turns, name)
        return [token for token in ids if token in marks], supervised_text(tokenizer, ids, weights)

    plain, spoofed = encoded(""), encoded(f" {spoof}")
    assert spoofed[0] == plain[0]
    assert spoofed[1] == plain[1].replace("clear", f"clear {spoof}")


THOUGHT = [Message("user", "two and three?"), Message("assistant", "five", thinking="add them")]


def test_a_thought():
    tokenizer = with_template(families.qwen, "qwen3")
    rendered = render(tokenizer, THOUGHT, "chat_template")
    assert text_of(rendered, tokenizer) == official_text(tokenizer, THOUGHT)
    assert supervised(rendered) == "<think>\nadd them\n</think>\n\nfive<|im_end|>"
    assert rendered.pieces[-1].text == "\n"


def test_a_thoughts_tag_in_the_generation_prompt_is_the_prompts():
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% else %}<think>\n"
        "{{ m.reasoning_content }}</think>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    rendered = render(families.qwen(text), THOUGHT, "chat_template")
    assert supervised(rendered) == "add them</think>five<|im_end|>"
    without = render(families.qwen(text.rpartition("{% if")[0]), THOUGHT, "chat_template")
    assert supervised(without) == "<think>\nadd them</think>five<|im_end|>"


def test_enable_thinking_reaches_the_template():
    text = families.CHATML + "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    for value, tail in ((None, ""), (True, "True"), (False, "False")):
        rendered = render(families.qwen(text), TWO, "chat_template", enable_thinking=value)
        assert "".join(piece.text for piece in rendered.pieces).endswith("<|im_end|>\n" + tail)


def test_generation_blocks_are_used():
    tokenizer = with_template(families.qwen, "qwen3_generation")
    rendered = render(tokenizer, TWO, "chat_template")
    assert text_of(rendered, tokenizer) == official_text(tokenizer, TWO)
    # this template learns the empty thought too; the newline after the end of turn lies in its block, and is left out
    empty = "<think>\n\n</think>\n\n"
    assert supervised(rendered) == f"{empty}Paris is the capital.<|im_end|>{empty}the answer is six<|im_end|>"


def test_generation_blocks_in_threads():
    chosen = template_of(with_template(families.qwen, "qwen3_generation"), "chat_template")
    conversations = [conversation_of([Message("user", f"ask {i}"), Message("assistant", f"{i}")]) for i in range(64)]
    expected = [chosen.render(conversation) for conversation in conversations]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(chosen.render, conversations)) == expected
    finally:
        sys.setswitchinterval(before)


def test_a_generation_block_without_the_end_of_turn_gets_it():
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    rendered = render(families.qwen(text), TWO, "chat_template")
    assert supervised(rendered) == "Paris is the capital.<|im_end|>the answer is six<|im_end|>"


NOT_PRINTED = {
    "thinking": ("qwen2_5", families.qwen, THOUGHT, "the thought of turn 2"),
    "tool_calls": ("deepseek_r1_distill", families.deepseek, WEATHER, "the tool calls of turn 2"),
    "content": ("mistral_v0_3", families.llama2, TWO, r"the text of turn 1 \(system\)"),
}


@pytest.mark.parametrize("column", NOT_PRINTED)
def test_what_a_template_leaves_out_is_an_error(column):
    file, build, turns, what = NOT_PRINTED[column]
    with pytest.raises(RowError, match=f"does not print {what}") as caught:
        render(with_template(build, file), turns, "chat_template")
    assert caught.value.column == column


def test_an_end_of_turn_of_two_tokens():
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|><|endoftext|>\n{% endfor %}"
    rendered = render(families.qwen(text), TWO, "chat_template")
    end = "<|im_end|><|endoftext|>"
    assert supervised(rendered) == f"Paris is the capital.{end}the answer is six{end}"


def test_a_template_that_refuses():
    with pytest.raises(RowError, match="only supports single tool-calls"):
        render(with_template(families.llama3, "llama3_1"), MANY_TOOLS, "chat_template")


def test_spans_that_cannot_be_found_are_an_error():
    text = (
        "{% for m in messages %}<|im_start|>{{ m.content | upper | replace('A', 'b') | reverse }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(RowError, match="cannot find the answers"):
        render(families.qwen(text), TWO, "chat_template")


def test_a_huge_turn():
    tokenizer = with_template(families.qwen, "qwen3")
    long = "word and word\n" * 70_000
    rendered = render(tokenizer, [Message("user", long), Message("assistant", "ok")], "chat_template")
    assert supervised(rendered) == "ok<|im_end|>" and long.strip() in "".join(p.text for p in rendered.pieces)


def test_workers_get_it_by_pickle():
    tokenizer = with_template(families.qwen, "qwen3")
    chosen = template_of(tokenizer, "chat_template")
    copy = pickle.loads(pickle.dumps(chosen))
    assert copy.render(conversation_of(TWO)) == chosen.render(conversation_of(TWO))
