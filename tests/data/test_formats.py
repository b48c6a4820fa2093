"""Formats of single rows: what each becomes, the odd ones included, and that a wrong row is named by its column."""

from __future__ import annotations

import pickle
import sys

import pytest

from primus_bridge.config.arguments import DatasetArguments
from primus_bridge.data.formats import Format, format_name, open_format, recognise
from primus_bridge.data.messages import Message, RowError, ToolCall, Unusable
from primus_bridge.data.sources import Row, Source
from primus_bridge.errors import ConfigError

from .conftest import alpaca_rows

ROWS = alpaca_rows(5)
ASKED = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "four"}


def opened(name: str, **options) -> Format:
    """The format, as a tokenising process gets it."""
    return pickle.loads(pickle.dumps(open_format(name, DatasetArguments(**options))))


def convert(name: str, row: dict, **options):
    (conversation,) = opened(name, **options).conversations(row)
    return conversation


def said(name: str, row: dict, **options) -> list[tuple[str, str, str]]:
    return [(m.role, m.content, m.context) for m in convert(name, row, **options).messages]


def refused(name: str, row: dict, **options) -> RowError:
    with pytest.raises(RowError) as caught:
        convert(name, row, **options)
    return caught.value


def counted(name: str, row: dict, reason: str = "no_answer", **options) -> None:
    with pytest.raises(Unusable) as caught:
        opened(name, **options).conversations(row)
    assert caught.value.reason == reason


# alpaca, dolly, squad, prompt_completion


@pytest.mark.parametrize("empty", ["", None, "absent"])
def test_alpaca(empty):
    row = {"instruction": "Größe 😀\r\n漢字", "input": empty, "output": " four\r\n"}
    if empty == "absent":
        del row["input"]
    assert said("alpaca", row) == [("user", "Größe 😀\r\n漢字", ""), ("assistant", " four\r\n", "")]
    assert said("alpaca", {**row, "input": "c"})[0] == ("user", "Größe 😀\r\n漢字", "c")


def test_alpaca_history_and_system():
    row = {"instruction": "i", "input": "c", "output": "o", "system": "s", "history": [["q", "a"]]}
    messages = convert("alpaca", row).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.text for m in messages] == ["s", "q", "a", "i\nc", "o"]
    assert len(said("alpaca", {**row, "system": None, "history": None})) == 2


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"instruction": "x", "output": 3}, "output", "expected text, found int 3"),
        ({"instruction": "x", "output": None}, "output", "expected text, found nothing"),
        ({"instruction": None, "output": "y"}, "instruction", "expected text"),
        ({"instruction": "x", "response": "y"}, "output", "missing"),
        (
            {"instruction": "x", "ouput": "y"},
            "output",
            "missing - did you mean 'ouput'? (the row has: instruction, ouput)",
        ),
        ({"instruction": "x", "input": ["a"], "output": "y"}, "input", "expected text"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0]", "pair"),
        ({"instruction": "x", "output": "y", "history": "a"}, "history", "expected a list of turns"),
        ({"instruction": "x", "output": "a\ufdd2b"}, "output", "noncharacter"),
        ({"instruction": "x", "output": "a\ud83d"}, "output", "surrogate"),
    ],
)
def test_a_wrong_alpaca_row_is_named(write, row, column, message):
    error = refused("alpaca", row)
    assert error.column == column and message in error.message
    told = error.at(Row(row, 6, "rows.jsonl:7"))
    assert str(told).startswith(f"rows.jsonl:7: row 6, column '{column}': ")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {"instruction": "x", "output": ""}),
        ("alpaca", {"instruction": "x", "output": " \r\n\u3000"}),
        ("alpaca", {"instruction": "x", "output": "y", "history": [["a", ""]]}),
        ("dolly", {"instruction": "x", "response": "\n"}),
        ("prompt_completion", {"prompt": "x", "completion": ""}),
        ("squad", {"question": "x", "context": "c", "answers": {"text": [], "answer_start": []}}),
        ("squad", {"question": "x", "context": "c", "answers": []}),
        ("squad", {"question": "x", "context": "c", "answers": None}),
        ("messages", {"messages": [ASKED, {"role": "assistant", "content": ""}]}),
        ("messages", {"messages": [ASKED]}),
        ("messages", {"messages": [ANSWER]}),
        ("messages", {"messages": []}),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}),
        ("preference", {"prompt": "x", "chosen": " ", "rejected": "y"}),
        ("preference", {"prompt": "x", "chosen": [], "rejected": []}),
    ],
)
def test_a_row_without_an_answer_is_counted(name, row):
    counted(name, row)


def test_dolly():
    row = {"instruction": "When?", "context": "It was 1998.", "response": "1998", "category": "closed_qa"}
    assert said("dolly", row) == [("user", "When?", "It was 1998."), ("assistant", "1998", "")]
    assert said("dolly", {**row, "context": ""})[0] == ("user", "When?", "")
    assert refused("dolly", {"instruction": "x", "output": "y"}).column == "response"


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["1998", "in 1998"], "answer_start": [7, 4]},
        [{"text": "1998", "answer_start": 7}, {"text": "in 1998", "answer_start": 4}],
        ["1998", "in 1998"],
        "1998",
    ],
)
def test_squad(answers):
    row = {"id": "1", "title": "t", "question": "When?", "context": "It was 1998.", "answers": answers}
    assert said("squad", row) == [("user", "When?", "It was 1998."), ("assistant", "1998", "")]


def test_a_wrong_squad_row_is_named():
    row = {"question": "x", "context": "c"}
    assert refused("squad", row).column == "answers"
    assert refused("squad", {**row, "answers": {"texts": ["a"]}}).message.startswith("missing - did you mean 'texts'?")
    assert refused("squad", {**row, "answers": [{"text": 3}]}).column == "answers[0].text"


def test_prompt_completion():
    pair = [("user", "a", ""), ("assistant", " b", "")]
    assert said("prompt_completion", {"prompt": "a", "completion": " b"}) == pair
    assert said("prompt_completion", {"prompt": "a", "response": " b"}) == pair
    lists = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": " b"}],
        "tools": [{"name": "f"}],
    }
    assert said("prompt_completion", lists) == [("system", "s", ""), *pair]
    assert convert("prompt_completion", lists).tools == ({"name": "f"},)
    assert refused("prompt_completion", {"prompt": 3, "completion": "b"}).column == "prompt"


# conversations


def test_sharegpt():
    turns = [("system", "Be kind."), ("gpt", "Hello!"), ("human", "a"), ("gpt", "b"), ("human", "c")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    conversation = convert("sharegpt", row)
    assert [message[:2] for message in conversation.messages] == [
        ("system", "Be kind."),
        ("user", "a"),
        ("assistant", "b"),
    ]
    assert conversation.skipped_turns == 2
    late = {"conversations": [row["conversations"][i] for i in (1, 0, 2, 3)]}
    assert said("sharegpt", late)[0] == ("system", "Be kind.", "")  # behind a greeting it stays too
    assert said("sharegpt", {"conversations": row["conversations"][2:], "system": "s"})[0] == ("system", "s", "")


def test_two_system_texts():
    row = {"messages": [{"role": "system", "content": "Be kind."}, ASKED, ANSWER]}
    turns = [("system", "Be kind.", ""), ("user", "x", ""), ("assistant", "four", "")]
    for same in ("Be kind.", "", None):
        assert said("messages", {**row, "system": same}) == turns
    error = refused("messages", {**row, "system": "Be brief."})
    assert (error.column, error.message) == (
        "system",
        "two system texts, 'Be brief.' and in the turns 'Be kind.'; keep one",
    )
    empty = {"messages": [{"role": "system", "content": ""}, ASKED, ANSWER], "system": "Be kind."}
    assert said("messages", empty) == turns


def test_consecutive_turns_of_one_role_are_kept():
    turns = [("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert said("sharegpt", row) == [
        ("user", "a", ""),
        ("user", "b", ""),
        ("assistant", "c", ""),
        ("assistant", "d", ""),
    ]


def test_sharegpt_tools():
    row = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "get", "arguments": {"city": "東京", "days": 2}}'},
            {"from": "observation", "value": '{"sky": "☀"}'},
            {"from": "function_call", "value": '[{"name": "a", "arguments": "{\\"x\\": 1}"}, {"name": "b"}]'},
            {"from": "tool", "value": "done"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": '[{"name": "get", "parameters": {"type": "object"}}]',
    }
    conversation = convert("sharegpt", row)
    assert conversation.messages == [
        Message("user", "weather?"),
        Message("assistant", tool_calls=(ToolCall("get", {"city": "東京", "days": 2}),)),
        Message("tool", '{"sky": "☀"}'),
        Message("assistant", tool_calls=(ToolCall("a", {"x": 1}), ToolCall("b", {}))),
        Message("tool", "done"),
        Message("assistant", "Sunny."),
    ]
    assert conversation.tools == ({"name": "get", "parameters": {"type": "object"}},)
    for none in ("", "[]", [], None):
        assert convert("sharegpt", {**row, "tools": none}).tools == ()
    assert "malformed JSON" in refused("sharegpt", {**row, "tools": "[{]"}).message
    assert refused("sharegpt", {**row, "tools": [3]}).column == "tools[0]"
    bad = {"conversations": [row["conversations"][0], {"from": "function_call", "value": "get()"}]}
    assert refused("sharegpt", bad).column == "conversations[1].value"


def test_openai_messages():
    definition = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "add them"},
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "It is 2.", "tool_calls": None, "weight": 0.5},
            {"role": "user", "content": "thanks", "reasoning_content": "", "tool_calls": []},
            {"role": "assistant", "content": "<think>x</think>Welcome", "train": False},
            {"role": "user", "content": "bye", "train": True},
            {"role": "assistant", "content": "Bye", "weight": 1, "function_call": {"name": "end", "arguments": "now"}},
        ],
        "tools": [definition, '{"name": "end"}'],
    }
    conversation = convert("messages", row)
    assert conversation.messages == [
        Message("system", "s"),
        Message("user", "1 + 1?"),
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}, "c1"),), thinking="add them"),
        Message("tool", "2", name="add", tool_call_id="c1"),
        Message("assistant", "It is 2.", weight=0.5),
        Message("user", "thanks"),
        Message("assistant", "<think>x</think>Welcome", weight=0.0),
        Message("user", "bye", weight=1.0),
        Message("assistant", "Bye", weight=1.0, tool_calls=(ToolCall("end", "now"),)),
    ]
    assert conversation.tools == (definition, {"name": "end"})


@pytest.mark.parametrize(
    ("turns", "column", "message"),
    [
        ([{"role": "wizard", "content": "x"}, ANSWER], "messages[0].role", "unknown role 'wizard'"),
        ([{"role": "user", "content": 7}, ANSWER], "messages[0].content", "expected text"),
        ([ASKED, {"role": "assistant", "content": None}], "messages[1].content", "expected text, found nothing"),
        (["hi", ANSWER], "messages[0]", "expected an object"),
        ("hi", "messages", "expected a list"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "messages[0].content[0]", "not text"),
        ([ASKED, {**ANSWER, "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls[0].name", "expected text"),
        ([ASKED, {**ANSWER, "tool_calls": "[f"}], "messages[1].tool_calls", "malformed JSON"),
        (
            [{**ASKED, "tool_calls": [{"name": "f"}]}, ANSWER],
            "messages[0].tool_calls",
            "belongs to an assistant's turn",
        ),
        ([{**ASKED, "reasoning": "hm"}, ANSWER], "messages[0].reasoning", "belongs to an assistant's turn"),
        ([ASKED, {**ANSWER, "weight": -1}], "messages[1].weight", "not negative"),
        ([ASKED, {**ANSWER, "weight": float("nan")}], "messages[1].weight", "not negative"),
        ([ASKED, {**ANSWER, "weight": "1"}], "messages[1].weight", "expected a number"),
        ([ASKED, {**ANSWER, "train": 1}], "messages[1].train", "true or false"),
        (
            [ASKED, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {"a": "\ufdd1"}}]}],
            "messages[1].tool_calls[0].arguments",
            "noncharacter",
        ),
    ],
)
def test_a_wrong_conversation_is_named(turns, column, message):
    error = refused("messages", {"messages": turns})
    assert error.column == column and message in error.message


def test_a_megabyte_in_one_turn(write):
    turns = [{"role": "user", "content": "x" * 1_000_000}, {"role": "assistant", "content": "漢" * 1_000_000}]
    (row,) = Source(write([{"messages": turns}]))
    assert [len(message.content) for message in convert("messages", row.data).messages] == [1_000_000, 1_000_000]


# preference pairs

PAIR = ([Message("user", "q")], [Message("assistant", "good")], [Message("assistant", "bad")])


def chat(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": chat("q"), "chosen": chat("q", "good")[1:], "rejected": chat("q", "bad")[1:]},
        {"chosen": chat("q", "good"), "rejected": chat("q", "bad")},
        {"prompt": "q", "chosen": chat("q", "good"), "rejected": chat("q", "bad"), "messages": chat("q", "good")},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    ],
)
def test_preference(row):
    pair = opened("preference").pair(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == PAIR
    assert convert("preference", row).messages == [*PAIR[0], *PAIR[1]]


def test_preference_of_several_turns():
    chosen, rejected = chat("a", "b", "c", "good"), chat("a", "b", "c", "bad")
    pair = opened("preference").pair({"chosen": chosen, "rejected": rejected, "system": "s", "tools": [{"name": "f"}]})
    assert [message.content for message in pair.prompt] == ["s", "a", "b", "c"]
    assert (pair.chosen[0].content, pair.rejected[0].content, pair.tools) == ("good", "bad", ({"name": "f"},))
    # the same first answer, then another question: the prompt ends where the answers begin
    pair = opened("preference").pair({"chosen": chosen, "rejected": chat("a", "b", "d", "bad")})
    assert ([m.content for m in pair.prompt], [m.content for m in pair.rejected]) == (["a"], ["b", "d", "bad"])


def test_a_wrong_preference_is_named():
    assert refused("preference", {"chosen": "a", "rejected": "b"}).column == "prompt"
    assert refused("preference", {"prompt": chat("a", "b"), "chosen": "a", "rejected": "b"}).column == "prompt"
    assert refused("preference", {"chosen": chat("a", "b"), "rejected": chat("c", "d")}).column == "rejected"
    assert refused("preference", {"prompt": "q", "chosen": "a"}).column == "rejected"


# columns, names, and recognition


def test_columns_are_renamed():
    columns = {"instruction": "question", "output": "answer", "input": "instruction"}
    row = {"question": "q", "answer": "a", "instruction": "c"}
    assert said("alpaca", row, columns=columns) == [("user", "q", "c"), ("assistant", "a", "")]
    error = refused("alpaca", {"question": "q", "anwser": "a", "instruction": "c"}, columns=columns)
    assert (
        error.column == "answer" and "did you mean 'anwser'? (dataset.columns reads 'output' from it" in error.message
    )
    pair = opened("dpo", columns={"chosen": "good"}).pair({"prompt": "q", "good": "a", "rejected": "b"})
    assert pair.chosen == [Message("assistant", "a")]
    with pytest.raises(ConfigError, match="no column 'instructon' - did you mean 'instruction'"):
        opened("alpaca", columns={"instructon": "x"})
    with pytest.raises(ConfigError, match="must name a column"):
        opened("alpaca", columns={"instruction": 3})


def test_documents():
    assert opened("text").document({"text": ""}) == ""
    assert opened("text", columns={"text": "body"}).document({"body": "a\r\n", "text": "no"}) == "a\r\n"
    with pytest.raises(RowError, match="missing"):
        opened("text").document({"txt": "a"})


def test_names():
    assert [format_name(name) for name in ("chat", "openai", "dpo", "oasst2", "auto")] == [
        *("messages", "messages", "preference", "oasst", "auto"),
    ]
    with pytest.raises(ConfigError, match="unknown format 'alpacca' - did you mean 'alpaca'"):
        format_name("alpacca")


def seen(*rows, stage="sft", asked="auto", columns=None) -> tuple[str, str]:
    return recognise([Row(row, i, f"rows.jsonl:{i}") for i, row in enumerate(rows, 1)], asked, stage, columns)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpaca", {**ROWS[0], "text": "t"}),
        ("alpaca", {**ROWS[0], "messages": None}),
        ("dolly", {"instruction": "x", "context": "", "response": "y", "category": "z"}),
        ("messages", {"messages": [ASKED, ANSWER], "prompt": "x", "prompt_id": "1"}),
        ("messages", {"messages": "hello"}),  # the row's own error says what is wrong
        ("messages", {"conversations": [ASKED]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}),
        ("sharegpt", {"messages": [{"from": "human", "value": "x"}]}),
        ("prompt_completion", {"prompt": "x", "completion": "y"}),
        ("prompt_completion", {"prompt": [ASKED], "response": "y"}),
        ("squad", {"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}}),
        ("preference", {"prompt": "x", "chosen": [ANSWER], "rejected": [ANSWER], "messages": [ASKED, ANSWER]}),
        ("preference", {"conversations": [{"from": "human", "value": "x"}], "chosen": {}, "rejected": {}}),
        ("oasst", {"message_id": "1", "parent_id": None, "text": "x", "role": "prompter", "lang": "en"}),
        ("oasst", {"message_tree_id": "1", "prompt": {"text": "x", "role": "prompter", "replies": []}}),
    ],
)
def test_auto_recognises(name, row):
    assert seen(row) == (name, f"recognised from columns {', '.join(row)}")


def test_auto_says_what_it_saw():
    assert seen({**ROWS[0], "text": "t"}, stage="pretrain")[0] == "text"
    assert seen({"question": "x", "answer": "y"}, columns={"instruction": "question", "output": "answer"}) == (
        "alpaca",
        "recognised from columns question, answer; question read as instruction, answer read as output",
    )
    # an empty conversation says nothing of its shape; the rows after it do
    assert seen({"conversations": []}, {"conversations": [{"from": "human", "value": "x"}]})[0] == "sharegpt"
    with pytest.raises(ConfigError, match="columns: question, answer"):
        seen({"question": "x", "answer": "y"})
    with pytest.raises(ConfigError, match="rows.jsonl:2.*columns: .*; and then messages"):
        seen(ROWS[0], {"messages": [ASKED]})
    with pytest.raises(ConfigError, match="set stage: pretrain"):
        seen({"text": "x"})
    with pytest.raises(ConfigError, match="set stage: sft"):
        seen(ROWS[0], stage="pretrain")
    assert seen(ROWS[0], asked="chat") == ("messages", "asked for")
    with pytest.raises(ConfigError, match="does not fit stage 'sft'"):
        seen(ROWS[0], asked="text")


# custom


def custom(row: dict, **mapping) -> list[tuple[str, str, str]]:
    return said("custom", row, custom_format=mapping)


def test_custom_texts():
    row = {"q": "Why {a}?", "a": "{q} Because 漢字", "n": 3, "x": None}
    assert custom(row, system="Level {n}{x}", user="Q: {q}\r\n{{{n}}}", assistant="{a}") == [
        ("system", "Level 3", ""),
        ("user", "Q: Why {a}?\r\n{3}", ""),
        ("assistant", "{q} Because 漢字", ""),
    ]
    assert len(custom(row, system="{x}", user="{q}", assistant="{a}")) == 2  # an empty system text is none
    counted("custom", row, custom_format={"user": "{q}", "assistant": " {x}"})
    for template, column in (("{qq}", "qq"), ("{q.__class__}", "q.__class__"), ("{q!r}", "q!r"), ("{}", "")):
        error = refused("custom", row, custom_format={"user": template, "assistant": "{a}"})
        assert error.column == column and "missing" in error.message
    assert refused("custom", {"q": [1]}, custom_format={"user": "{q}", "assistant": "b"}).column == "q"


def test_custom_turns():
    row = {"dialogue": [{"who": "Client", "said": "a"}, {"who": "Agent", "said": "b", "weight": 2}], "system": "s"}
    mapping = {"turns": "dialogue", "role": "who", "content": "said", "roles": {"Client": "user", "Agent": "assistant"}}
    assert convert("custom", row, custom_format=mapping).messages == [
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "b", weight=2.0),
    ]
    row["dialogue"].append({"who": "Boss", "said": "c"})
    error = refused("custom", row, custom_format=mapping)
    assert error.column == "dialogue[2].who" and "known are Client, Agent" in error.message


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"user": "{q}"}, "'assistant' is missing"),
        ({"user": "{q}", "asistant": "{a}"}, "unknown key 'asistant' - did you mean 'assistant'"),
        ({"user": "{q}", "assistant": 3}, "'assistant' must be text"),
        ({"turns": "d", "user": "{q}"}, "unknown key 'user'"),
        ({"turns": "d", "roles": {"me": "boss"}}, "roles must map"),
        ({}, "set one of them"),
    ],
)
def test_a_wrong_custom_format_is_named(mapping, message):
    with pytest.raises(ConfigError, match="dataset.custom_format") as caught:
        open_format("custom", DatasetArguments(custom_format=mapping))
    assert message in caught.value.message


@pytest.fixture(scope="module")
def my_formats(tmp_path_factory):
    """A module of the user's in the current folder."""
    path = tmp_path_factory.mktemp("current") / "my_formats.py"
    path.write_text(
        "def turns(row):\n"
        "    return [{'role': 'user', 'content': row['q']}, {'role': 'assistant', 'content': row['a']}]\n"
        "def several(row):\n"
        "    return [{'messages': turns(row), 'system': 's'}, turns(row)]\n"
        "def nothing(row):\n"
        "    return None\n"
        "def wrong(row):\n"
        "    return 'text'\n"
        "constant = 3\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        patch.setattr(sys, "path", [*sys.path])
        yield path


def test_a_function_of_the_users(my_formats):
    row = {"q": "x", "a": "y"}
    assert said("custom", row, format_function="my_formats.turns") == [("user", "x", ""), ("assistant", "y", "")]
    both = opened("custom", format_function="my_formats.several").conversations(row)
    assert [[message.content for message in one.messages] for one in both] == [["s", "x", "y"], ["x", "y"]]
    counted("custom", row, reason="filtered", format_function="my_formats.nothing")
    counted("custom", {"q": "x", "a": ""}, format_function="my_formats.turns")
    error = refused("custom", {"q": "x"}, format_function="my_formats.turns")
    assert error.message == f"my_formats.turns raised KeyError: 'a' ({my_formats}:2)"
    error = refused("custom", {"q": "x", "a": 3}, format_function="my_formats.turns")
    assert "returned messages[1].content: expected text, found int 3" in error.message
    assert "returned 'text'; expected" in refused("custom", row, format_function="my_formats.wrong").message
    # what the cache of tokenised data goes by
    before = opened("custom", format_function="my_formats.turns").fingerprint()
    my_formats.write_text(my_formats.read_text() + "\n")
    assert opened("custom", format_function="my_formats.turns").fingerprint() != before


PACKAGE = {
    "own_formats/__init__.py": "",
    "own_formats/convert.py": "from . import names\nfrom own_words import *\ndef turns(row): return None\n",
    "own_formats/names.py": "def late():\n    import own_late.deep\n",
    "own_formats/unused.py": "",
    "own_words.py": "from json import dumps\nimport own_installed",
    "own_late/deep.py": "import own_formats.convert, nothing_of_that_name\n",
    "site-packages/own_installed.py": "",
    "unused.py": "",
}


def test_the_fingerprint_of_a_function_follows_what_it_imports(tmp_path, monkeypatch):
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site-packages")])
    fingerprint = opened("custom", format_function="own_formats.convert.turns").fingerprint
    for name, text in PACKAGE.items():
        before = fingerprint()
        assert before == fingerprint()
        (tmp_path / name).write_text(text + "# changed\n")
        assert (fingerprint() == before) == ("unused" in name or "installed" in name), name
    assert "own_late" not in sys.modules  # read, not run


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("turns", "no dotted path"),
        ("my_formatz.turns", "cannot import 'my_formatz'"),
        ("my_formats.turn", "does not exist - did you mean 'turns'"),
        ("my_formats.constant", "is no function"),
    ],
)
def test_a_wrong_function_is_named(my_formats, function, message):
    with pytest.raises(ConfigError, match="dataset.format_function") as caught:
        open_format("custom", DatasetArguments(format_function=function))
    assert message in caught.value.message
