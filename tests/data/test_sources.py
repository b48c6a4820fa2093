"""Sources and formats: what is read, and that every malformed row is named by file, line, row and column."""

from __future__ import annotations

import json

import pytest

from primus_bridge.data.dataset import build_datasets
from primus_bridge.data.formats import CONVERSATIONS, RowError, recognise
from primus_bridge.data.sources import Source
from primus_bridge.data.tokenizer import load_tokenizer, pad_token_id
from primus_bridge.errors import ConfigError

from . import families
from .conftest import alpaca_rows, arguments

ROWS = alpaca_rows(5)
ANSWER = {"role": "assistant", "content": "four"}


def refused(path, **options) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build_datasets(arguments(path, **options), families.qwen())
    return caught.value


def test_json_jsonl_and_parquet_hold_the_same_rows(tmp_path, write):
    import pyarrow
    import pyarrow.parquet

    rows = [*ROWS, {"instruction": "When?", "input": "", "output": "2020-01-01 00:00:00"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path in (write(rows, "rows.json"), write(rows), tmp_path / "rows.parquet"):
        source = Source(str(path))
        assert len(source) == 6
        assert [row.data for row in source] == rows  # the date stays text
        assert [row.number for row in source] == [1, 2, 3, 4, 5, 6]


def test_max_samples_takes_the_first_rows(write):
    assert [row.data for row in Source(write(ROWS), max_samples=2)] == ROWS[:2]
    assert len(Source(write(ROWS), max_samples=99)) == 5


def test_a_folder_by_split(tmp_path, write):
    write(ROWS[:2], "folder/train-00000.jsonl")
    write(ROWS[2:4], "folder/train-00001.jsonl")
    write(ROWS[4:], "folder/validation.jsonl")
    assert [row.data for row in Source(str(tmp_path / "folder"))] == ROWS[:4]
    assert [row.data for row in Source(str(tmp_path / "folder"), split="validation")] == ROWS[4:]
    with pytest.raises(ConfigError, match="'test'.*found: train, validation"):
        Source(str(tmp_path / "folder"), split="test")


def test_a_folder_without_split_names_is_all_train(tmp_path, write):
    write(ROWS[:2], "plain/a.json")
    write(ROWS[2:], "plain/deeper/b.json")
    assert [row.data for row in Source(str(tmp_path / "plain"))] == ROWS


def test_crlf_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "windows.jsonl"
    lines = [json.dumps(ROWS[0]), "", json.dumps(ROWS[1]), "   "]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    source = Source(str(path))
    assert len(source) == 2
    assert [(row.data, row.where) for row in source] == [(ROWS[0], f"{path}:1"), (ROWS[1], f"{path}:3")]


def test_jsonl_under_the_name_json(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert [row.data for row in Source(str(path))] == ROWS


def test_malformed_jsonl_names_the_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n\n{"instruction": "x", "output": \n')
    error = refused(path)
    assert error.where == f"{path}:3" and "malformed JSON" in error.message


def test_malformed_json_names_the_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[\n{"instruction": "x", "output": "y"},\n{"instruction": "x", "output": }\n]')
    assert refused(path).where == f"{path}:3"
    path.write_text('[\n{"instruction": "x", "output": "y"}\n{"instruction": "x", "output": "y"}]')
    assert refused(path).where == f"{path}:3"
    path.write_text('[{"instruction": "x", "output": "y"},\n')
    assert "malformed" in str(refused(path))


def test_invalid_utf8_names_the_line(tmp_path):
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"instruction": "\xe9t\xe9", "output": "y"}\n')
    error = refused(path)
    assert error.where == f"{path}:2" and "UTF-8" in error.message
    listed = tmp_path / "latin1.json"
    listed.write_bytes(b'[\n{"instruction": "\xe9t\xe9", "output": "y"}]')
    assert refused(listed).where == f"{listed}:2"


def test_a_missing_file_is_not_tried_on_the_hub(tmp_path):
    for path in (str(tmp_path / "absent.jsonl"), "absent/train.jsonl", "./absent", "~/absent"):
        error = refused(path)
        assert "no such file or folder (looked for /" in error.message and "hub" not in error.message


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    import datasets
    import huggingface_hub

    # both read HF_HUB_OFFLINE once, when they are imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "hub" in refused("nobody/nothing-of-that-name").message


def test_an_empty_data_set(tmp_path):
    for name, content in (("a.jsonl", "\n\n"), ("b.json", "[]"), ("c.json", "")):
        (tmp_path / name).write_text(content)
        assert "data set is empty" in refused(tmp_path / name).message
    (tmp_path / "folder").mkdir()
    assert "no data file" in refused(tmp_path / "folder").message


def test_other_files_are_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    assert ".jsonl" in refused(tmp_path / "rows.xlsx").message
    (tmp_path / "rows.parquet").write_text("not parquet")
    error = refused(tmp_path / "rows.parquet")
    assert "Parquet" in error.message and error.where == str(tmp_path / "rows.parquet")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    assert "must be an object" in refused(tmp_path / "list.jsonl").message


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"instruction": "x", "output": ""}, "output", "no answer"),
        ({"instruction": "x", "output": " \n"}, "output", "no answer"),
        ({"instruction": "x", "output": 3}, "output", "expected text, found int 3"),
        ({"instruction": "x", "output": None}, "output", "expected text, found nothing"),
        ({"instruction": None, "output": "y"}, "instruction", "expected text"),
        ({"instruction": "x", "response": "y"}, "output", "missing"),
        ({"instruction": "x", "input": ["a"], "output": "y"}, "input", "expected text"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0]", "pair"),
        ({"instruction": "x", "output": "y", "history": [["a", ""]]}, "history[0][1]", "no answer"),
        ({"instruction": "x", "output": "a\ufdd2b"}, "output", "noncharacter"),
    ],
)
def test_a_wrong_alpaca_row_is_named(write, row, column, message):
    path = write([*ROWS, row])
    error = refused(path, dataset_format="alpaca")
    assert error.where == f"{path}:6"
    assert error.message.startswith(f"row 6, column '{column}': ") and message in error.message


@pytest.mark.parametrize(
    ("turns", "column", "message"),
    [
        ([{"role": "user", "content": "x"}], "messages", "no answer"),
        ([ANSWER], "messages", "no answer"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}], "messages[1].content", "no answer"),
        ([{"role": "wizard", "content": "x"}, ANSWER], "messages[0].role", "unknown role 'wizard'"),
        ([{"role": "user", "content": 7}, ANSWER], "messages[0].content", "expected text"),
        (["hi", ANSWER], "messages[0]", "expected an object"),
        ("hi", "messages", "expected a list"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "messages[0].content", "not text"),
        (
            [{"role": "user", "content": "x"}, {**ANSWER, "tool_calls": [{"id": 1}]}],
            "messages[1].tool_calls",
            "not supported",
        ),
    ],
)
def test_a_wrong_conversation_is_named(turns, column, message):
    with pytest.raises(RowError) as caught:
        CONVERSATIONS["messages"]({"messages": turns})
    assert caught.value.column == column and message in caught.value.message


def test_sharegpt():
    turns = [("system", "Be kind."), ("gpt", "Hello!"), ("human", "a"), ("gpt", "b"), ("human", "c")]
    conversation = CONVERSATIONS["sharegpt"]({"conversations": [{"from": f, "value": v} for f, v in turns]})
    assert [tuple(message[:2]) for message in conversation.messages] == [
        ("system", "Be kind."),
        ("user", "a"),
        ("assistant", "b"),
    ]
    assert conversation.skipped_turns == 2


def test_alpaca_history_and_system():
    row = {"instruction": "i", "input": "c", "output": "o", "system": "s", "history": [["q", "a"]]}
    messages = CONVERSATIONS["alpaca"](row).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.text for m in messages] == ["s", "q", "a", "i\nc", "o"]


def test_auto_says_what_it_saw(write):
    def seen(row, stage="sft"):
        return recognise(list(Source(write([row]))), "auto", stage)

    assert seen(ROWS[0]) == ("alpaca", "recognised from columns instruction, input, output")
    assert seen({"messages": [{"role": "user", "content": "x"}, ANSWER]})[0] == "messages"
    assert seen({"conversations": [{"from": "human", "value": "x"}]})[0] == "sharegpt"
    assert seen({"conversations": [{"role": "user", "content": "x"}]})[0] == "messages"
    assert seen({**ROWS[0], "text": "t"})[0] == "alpaca"
    assert seen({"messages": "hello"})[0] == "messages"  # the row's own error says what is wrong
    assert seen({**ROWS[0], "text": "t"}, "pretrain")[0] == "text"
    with pytest.raises(ConfigError, match="columns: question, answer"):
        seen({"question": "x", "answer": "y"})
    with pytest.raises(ConfigError, match="set stage: pretrain"):
        seen({"text": "x"})
    with pytest.raises(ConfigError, match="set stage: sft"):
        seen(ROWS[0], "pretrain")


def test_load_tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    families.llama3().save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("Hello").input_ids == families.llama3()("Hello").input_ids
    assert pad_token_id(tokenizer, 10**6) == tokenizer.eos_token_id
    qwen = families.qwen()
    assert pad_token_id(qwen, 10**6) == qwen.pad_token_id != qwen.eos_token_id
    qwen.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_token_id(qwen, qwen.pad_token_id) == qwen.eos_token_id  # one that the model has no embedding for


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_no_code_of_a_tokenizer_folder_runs(tmp_path):
    folder = tmp_path / "remote"
    families.qwen().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    try:
        load_tokenizer(str(folder))
    except ConfigError:
        pass
    assert not (tmp_path / "ran").exists()
