"""build_datasets: truncation, splits, pretraining blocks, the ledger's sums, and the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from primus_bridge.data import dataset as dataset_module
from primus_bridge.data.dataset import build_datasets
from primus_bridge.data.ledger import Ledger
from primus_bridge.data.messages import Message
from primus_bridge.errors import ConfigError

from . import families
from .conftest import alpaca_rows, arguments
from .encoding import encode, supervised_text


def chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def sums_agree(split) -> None:
    assert split.tokens == split.supervised + split.masked
    assert split.rows == split.samples + split.lost


def test_samples_are_what_the_template_gives_in_file_order(write):
    tokenizer, rows = families.qwen(), alpaca_rows(7)
    bundle = build_datasets(arguments(write(rows)), tokenizer)
    assert len(bundle.train) == 7 and bundle.validation is None
    for i, row in enumerate(rows):
        messages = [Message("user", row["instruction"]), Message("assistant", row["output"])]
        ids, weights = encode(tokenizer, messages, "alpaca")
        assert bundle.train[i][0].tolist() == ids and bundle.train[i][1].tolist() == weights.tolist()
    ledger = bundle.ledger
    sums_agree(ledger.train)
    assert (ledger.sources[0].format, ledger.template) == ("alpaca", "alpaca")
    assert ledger.train.tokens == bundle.train.lengths.sum() == len(bundle.train.ids)
    assert ledger.train.supervised == bundle.train.loss_weights.sum()
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger
    assert any("supervised" in line for line in ledger.lines())


def long_conversation():
    row = chat("first question " * 30, "first answer", "second question " * 3, "two", "third", "the answer is five")
    row["messages"].insert(0, {"role": "system", "content": "Be kind."})
    return row


def test_left_cuts_the_oldest_turns_and_keeps_the_system(write):
    tokenizer = families.llama3()
    row = long_conversation()
    path = write([row])
    whole = build_datasets(arguments(path), tokenizer).train
    without_first = build_datasets(
        arguments(write([{"messages": row["messages"][:1] + row["messages"][3:]}], "b.jsonl")), tokenizer
    )
    expected = without_first.train[0]
    bundle = build_datasets(arguments(path, seq_length=len(expected[0])), tokenizer)
    ids, weights = bundle.train[0]
    # what the template writes for the shorter conversation, to the token
    assert ids.tolist() == expected[0].tolist() and weights.tolist() == expected[1].tolist()
    assert supervised_text(tokenizer, ids, weights) == "two<|eot_id|>the answer is five<|eot_id|>"
    split = bundle.ledger.train
    assert (split.truncated_samples, split.truncated_turns) == (1, 2)
    assert split.truncated_tokens == whole.lengths[0] - len(ids)
    sums_agree(split)
    # one token less: the second exchange goes too
    ids, weights = build_datasets(arguments(path, seq_length=len(expected[0]) - 1), tokenizer).train[0]
    assert tokenizer.decode(ids).startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    )
    assert supervised_text(tokenizer, ids, weights) == "the answer is five<|eot_id|>"
    assert "two" not in tokenizer.decode(ids)


@pytest.mark.parametrize("truncation", ["left", "right", "drop"])
def test_what_is_kept_is_never_longer_and_always_counted(write, truncation):
    tokenizer = families.qwen()
    rows = [long_conversation(), chat("q", "long " * 100), chat("q", "short"), chat("many words " * 40, "a")]
    path = write(rows)
    whole = build_datasets(arguments(path), tokenizer).train
    for seq_length in (20, 40, 64, 100, 150, 300):
        options = dict(seq_length=seq_length, truncation=truncation, max_dropped_fraction=1)
        bundle = build_datasets(arguments(path, **options), tokenizer)
        counts = bundle.ledger.train
        sums_agree(counts)
        assert bundle.train.lengths.max() <= seq_length
        kept = sum(whole.lengths[bundle.train.origin(i).row] for i in range(len(bundle.train)))
        assert kept - counts.truncated_tokens == counts.tokens == bundle.train.lengths.sum()
        for i in range(len(bundle.train)):
            ids, weights = bundle.train[i]
            assert weights.any()
            if truncation == "right":
                assert ids.tolist() == whole[bundle.train.origin(i).row][0][: len(ids)].tolist()


def test_right_cuts_the_end(write):
    path = write([chat("q", "one two three four five six seven eight nine ten"), chat("question " * 40, "a")])
    tokenizer = families.qwen()
    whole = build_datasets(arguments(path), tokenizer).train[0]
    bundle = build_datasets(arguments(path, seq_length=14, truncation="right"), tokenizer)
    assert len(bundle.train) == 1
    assert bundle.train[0][0].tolist() == whole[0][:14].tolist()
    counts = bundle.ledger.train
    # of the second sample nothing supervised would be left
    assert counts.dropped == {"cut_away": 1} and counts.truncated_samples == 1
    assert counts.truncated_tokens == len(whole[0]) - 14
    sums_agree(counts)


def test_an_exchange_that_does_not_fit_is_dropped_and_counted(write):
    path = write([chat("q", "long " * 100), chat("q", "short")])
    bundle = build_datasets(arguments(path, seq_length=40), families.qwen())
    assert len(bundle.train) == 1
    assert bundle.ledger.train.dropped == {"too_long": 1}
    assert any("1 of 2 train samples are lost (1 longer than seq_length)" in line for line in bundle.ledger.lines())
    sums_agree(bundle.ledger.train)
    with pytest.raises(ConfigError, match="of 2 rows none is left .2 longer than seq_length.*raise model.seq_length"):
        build_datasets(arguments(path, seq_length=4), families.qwen())


def test_drop(write):
    path = write([long_conversation(), chat("q", "short")])
    bundle = build_datasets(arguments(path, seq_length=60, truncation="drop"), families.qwen())
    assert len(bundle.train) == 1 and bundle.ledger.train.dropped == {"too_long": 1}
    assert bundle.ledger.train.truncated_samples == 0
    sums_agree(bundle.ledger.train)
    with pytest.raises(ConfigError, match="truncation: left"):
        build_datasets(arguments(path, seq_length=4, truncation="drop"), families.qwen())


def test_a_run_stops_when_too_much_would_be_lost(write):
    path = write([chat("q", "long " * 100)] * 3 + [chat("q", "short")] * 7)
    build_datasets(arguments(path, seq_length=40, max_dropped_fraction=0.3), families.qwen())
    with pytest.raises(
        ConfigError, match=r"3 of 10 train samples are lost .*more than max_dropped_fraction 0.29: raise"
    ):
        build_datasets(arguments(path, seq_length=40, max_dropped_fraction=0.29), families.qwen())


def test_bad_rows_stop_or_are_counted(write):
    rows = [*alpaca_rows(8), {"instruction": 5, "output": "x"}]
    path = write(rows)
    with pytest.raises(ConfigError, match="rows.jsonl:9: row 9, column 'instruction': expected text"):
        build_datasets(arguments(path), families.qwen())
    counts = build_datasets(arguments(path, bad_rows="drop"), families.qwen()).ledger.train
    assert (counts.samples, counts.dropped) == (8, {"bad_row": 1})


def four_conversations(row: dict) -> list:
    """For format_function: the second of four cannot be rendered."""
    said = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": "a"}]
    return [said, [said[0], {"role": "tool", "content": "x"}, said[1]], said, said]


def test_one_bad_conversation_of_a_row_costs_no_other(write):
    path = write([{"q": f"q{i}"} for i in range(5)])
    options = dict(dataset_format="custom", format_function="tests.data.test_dataset.four_conversations")
    with pytest.raises(ConfigError, match="rows.jsonl:1"):
        build_datasets(arguments(path, prompt_template="llama2", **options), families.llama2())
    bundle = build_datasets(arguments(path, prompt_template="llama2", bad_rows="drop", **options), families.llama2())
    counts = bundle.ledger.train
    assert (counts.rows, counts.samples, counts.dropped) == (5, 15, {"bad_row": 5})
    assert [bundle.train.origin(i)[1:] for i in range(4)] == [(0, 0), (0, 2), (0, 3), (1, 0)]


def test_cut_at_the_end_a_prompt_without_its_answer_is_no_sample(write):
    path, tokenizer = write([chat("question " * 40, "a"), chat("q", "five")]), families.qwen()
    options = dict(seq_length=30, truncation="right", prompt_loss_weight=0.5)
    counts = build_datasets(arguments(path, **options), tokenizer).ledger.train
    assert (counts.samples, counts.dropped) == (1, {"cut_away": 1})
    # with a loss on everything, what is left is worth learning
    everything = build_datasets(arguments(path, seq_length=30, truncation="right", loss_on="all"), tokenizer)
    assert everything.ledger.train.samples == 2


def test_pretraining_loses_documents_not_blocks(write):
    texts = [{"text": "the answer is five"}] * 70 + [{"text": ""}] * 30
    bundle = build_datasets(arguments(write(texts), stage="pretrain", seq_length=64), families.qwen())
    assert bundle.ledger.train.dropped == {"empty": 30}
    with pytest.raises(ConfigError, match="30 of 100 train documents are lost"):
        build_datasets(arguments(write(texts), stage="pretrain", max_dropped_fraction=0.2), families.qwen())


def test_blocks_know_the_document_they_begin_in(write):
    texts = [{"text": "the answer is five " * 5}] * 6
    bundle = build_datasets(arguments(write(texts), stage="pretrain", seq_length=16), families.qwen())
    rows = [bundle.train.origin(i).row for i in range(len(bundle.train))]
    assert rows == sorted(rows) and rows[0] == 0 and rows[-1] == 5 and len(set(rows)) == 6


def test_packed_pretraining_keeps_documents_apart(write):
    texts = [{"text": "the answer is five " * n} for n in (1, 2, 30, 1, 0, 5)]
    asked = arguments(write(texts), stage="pretrain", seq_length=32, packed_sequence=True)
    bundle = build_datasets(asked, families.qwen())
    data = bundle.train
    pieces = {}
    for i in range(len(data)):
        ids = data[i][0].tolist()
        before = pieces.setdefault(data.origin(i).row, [])
        pieces[data.origin(i).row] = before + (ids[1:] if before else ids)
    whole = [families.qwen()(row["text"]).input_ids + [families.qwen().eos_token_id] for row in texts]
    assert [pieces[row] for row in sorted(pieces)] == [
        ids for ids, row in zip(whole, texts, strict=True) if row["text"]
    ]
    assert data.packed and sorted(data.pack_samples.tolist()) == list(range(len(data)))


def test_an_error_names_the_data_of_its_split(write):
    held = write([chat("q", "long " * 100)] * 3, "held.jsonl")
    with pytest.raises(ConfigError, match="^[^,]*held.jsonl: the validation set is empty"):
        build_datasets(arguments(write([chat("q", "a")]), validation_data_path=held, seq_length=40), families.qwen())
    with pytest.raises(ConfigError, match="rows.jsonl: the data set is empty: it has no rows"):
        build_datasets(arguments(write([])), families.qwen())


def test_rows_without_an_answer_are_counted(write):
    path = write([*alpaca_rows(8), {"instruction": "x", "input": None, "output": " "}])
    counts = build_datasets(arguments(path), families.qwen()).ledger.train
    assert (counts.rows, counts.samples, counts.dropped) == (9, 8, {"no_answer": 1})


def test_turns_of_one_role_are_joined_where_the_template_needs_it(write):
    rows = [{"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("user", "b"), ("assistant", "c"))]}]
    path, tokenizer = write(rows), families.llama2()
    bundle = build_datasets(arguments(path, prompt_template="llama2"), tokenizer)
    assert "[INST] a\n\nb [/INST]" in tokenizer.decode(bundle.train[0][0])
    assert bundle.ledger.train.merged_turns == 1
    kept = build_datasets(arguments(path, prompt_template="chatml"), families.qwen())
    assert kept.ledger.train.merged_turns == 0


def test_every_token_masked(write):
    # a tokenizer whose template strips an answer of which nothing but a thought is there
    template = families.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(ConfigError) as caught:
        build_datasets(arguments(write([chat("q", "<think>only</think>")])), families.qwen(template))
    assert "row 1" in str(caught.value) and "does not print the text" in str(caught.value)


def test_validation_split_by_seed(write):
    path, tokenizer = write(alpaca_rows(20)), families.qwen()
    bundle = build_datasets(arguments(path, validation_split=0.2), tokenizer)
    texts = [tokenizer.decode(split[i][0]) for split in (bundle.train, bundle.validation) for i in range(len(split))]
    assert (len(bundle.train), len(bundle.validation)) == (16, 4)
    assert len(set(texts)) == 20
    other = build_datasets(arguments(path, validation_split=0.2, seed=5), tokenizer)
    assert sorted(tokenizer.decode(other.validation[i][0]) for i in range(4)) != sorted(texts[16:])
    assert len(build_datasets(arguments(path, validation_split=0.001), tokenizer).validation) == 1
    for split in (bundle.ledger.train, bundle.ledger.validation):
        sums_agree(split)
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        build_datasets(arguments(path, validation_split=0.999), tokenizer)


def test_validation_data_path(write):
    bundle = build_datasets(
        arguments(write(alpaca_rows(6)), validation_data_path=write(alpaca_rows(3), "held.json")), families.qwen()
    )
    assert (len(bundle.train), len(bundle.validation)) == (6, 3)
    assert bundle.ledger.validation.samples == 3


@pytest.mark.parametrize("build", [families.qwen, families.llama3, families.llama2])
def test_pretrain_blocks_predict_every_token_once(write, build):
    tokenizer = build()
    texts = ["the answer is five </s><|im_end|><|eot_id|>", "", "def f(x):\n    return x + 1 # 漢字", "a"] * 9
    bundle = build_datasets(arguments(write([{"text": t} for t in texts]), stage="pretrain", seq_length=16), tokenizer)
    stream = []
    for text in texts:
        if text:
            plain = tokenizer(text, split_special_tokens=True).input_ids
            stream += plain + [tokenizer.eos_token_id]
    if tokenizer.bos_token_id is not None:
        assert stream.count(tokenizer.bos_token_id) == 27
    predicted = []
    for i in range(len(bundle.train)):
        ids, weights = bundle.train[i]
        assert len(ids) <= 17 and weights.tolist() == [0] + [1] * (len(ids) - 1)
        assert i == 0 or ids[0] == bundle.train[i - 1][0][-1]
        predicted += ids[1:].tolist()
    assert set(bundle.train.lengths[:-1]) == {17}
    assert [int(bundle.train[0][0][0]), *predicted] == stream
    split = bundle.ledger.train
    assert (split.rows, split.dropped) == (36, {"empty": 9})
    assert split.supervised == len(stream) - 1 and split.tokens == split.supervised + split.masked


def test_worker_processes_give_the_same_samples(write):
    # control tokens in the data are text in every process
    rows = [{"instruction": f"<|im_start|> {i} <|endoftext|>", "output": f"say <|im_end|> {i}"} for i in range(2100)]
    path = write(rows)
    one = build_datasets(arguments(path, validation_split=0.1), families.qwen())
    (folder,) = (dataset_module.cached_folder("x", lambda to: None).parent).glob("?" * 64)
    os.rename(folder, folder.with_name("away"))
    two = build_datasets(arguments(path, validation_split=0.1, num_workers=2), families.qwen())
    assert np.array_equal(one.train.ids, two.train.ids) and np.array_equal(one.train.offsets, two.train.offsets)
    assert np.array_equal(one.validation.ids, two.validation.ids) and one.ledger == two.ledger


def keys(cache) -> set[str]:
    return {folder.name for folder in (cache / "tokenized").iterdir()}


def test_the_second_time_comes_from_the_cache(write, cache, monkeypatch):
    path, tokenizer = write(alpaca_rows(5)), families.qwen()
    first = build_datasets(arguments(path), tokenizer)

    def never(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(dataset_module, "_build", never)
    again = build_datasets(arguments(path), tokenizer)
    assert isinstance(again.train.ids, np.memmap)
    assert np.array_equal(first.train.ids, again.train.ids) and first.ledger == again.ledger
    # neither the place, nor what batching decides, changes a token
    moved = os.path.join(os.path.dirname(path), "moved.jsonl")
    os.rename(path, moved)
    build_datasets(arguments(moved, shuffle=False, pad_to="seq_length", num_workers=4, seed=9), tokenizer)


def test_whatever_changes_a_token_changes_the_key(write, cache):
    tokenizer = families.qwen()
    base = arguments(write(alpaca_rows(8)))
    build_datasets(base, tokenizer)
    count = 1
    changes = [
        (dict(prompt_template="chatml"), tokenizer),
        (dict(alpaca_response_newline=False), tokenizer),
        (dict(truncation="drop"), tokenizer),
        (dict(max_samples=4), tokenizer),
        (dict(loss_on="last_turn"), tokenizer),
        (dict(prompt_loss_weight=0.1), tokenizer),
        (dict(packed_sequence=True), tokenizer),
        (dict(bad_rows="drop"), tokenizer),
        (dict(validation_split=0.25), tokenizer),
        (dict(validation_split=0.25, seed=1), tokenizer),
        (dict(seq_length=100), tokenizer),
        ({}, families.llama3()),
        ({}, families.qwen(families.QWEN25)),
        (dict(data_path=write([*alpaca_rows(7), {"instruction": "x", "output": "y"}], "other.jsonl")), tokenizer),
    ]
    for options, with_tokenizer in changes:
        options = {"data_path": base.dataset.data_path, **options}
        build_datasets(arguments(**options), with_tokenizer)
        count += 1
        assert len(keys(cache)) == count, options


def test_a_file_changed_in_place_is_read_again(write, cache):
    path = write(alpaca_rows(3))
    stat = os.stat(path)
    first = build_datasets(arguments(path), families.qwen()).train
    changed = open(path).read().replace("Add 1 and 1", "Add 9 and 9")
    open(path, "w").write(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    second = build_datasets(arguments(path), families.qwen()).train
    assert second.ids.tolist() != first.ids.tolist() and second.digest != first.digest
    assert len(second) == len(first)


def test_a_folder_without_meta_is_not_trusted(write, cache):
    path = write(alpaca_rows(3))
    first = build_datasets(arguments(path), families.qwen())
    (folder,) = (cache / "tokenized").iterdir()
    (folder / "meta.json").unlink()
    (folder / "train.ids.npy").write_bytes(b"half")
    assert np.array_equal(build_datasets(arguments(path), families.qwen()).train.offsets, first.train.offsets)
    assert len(list((cache / "tokenized").iterdir())) == 1


def test_a_failed_build_leaves_nothing(write, cache):
    path = write([*alpaca_rows(3), {"instruction": "x", "output": 7}])
    with pytest.raises(ConfigError):
        build_datasets(arguments(path), families.qwen())
    assert not list((cache / "tokenized").iterdir())


BUILD = """
import sys
from primus_bridge.data import dataset
from tests.data import families
from tests.data.conftest import arguments
build = dataset._build
def told(*args):
    print("built", flush=True)
    build(*args)
dataset._build = told
print(len(dataset.build_datasets(arguments(sys.argv[1]), families.qwen()).train.ids))
"""


def in_two_processes(path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, path], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    return [(process.communicate(timeout=120), process.returncode) for process in processes]


def test_two_processes_build_once(write):
    results = in_two_processes(write(alpaca_rows(4000)))
    outputs = [out for (out, _), code in results if code == 0]
    assert len(outputs) == 2, results
    assert "".join(outputs).count("built") == 1
    assert outputs[0].split()[-1] == outputs[1].split()[-1]


def test_an_unwritable_cache_falls_back_to_the_temp_dir(write, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "temp").mkdir()
    monkeypatch.setenv("PRIMUS_BRIDGE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    assert len(build_datasets(arguments(write(alpaca_rows(3))), families.qwen()).train) == 3
    assert list((tmp_path / "temp").glob("primus_bridge-*/tokenized/*/meta.json"))


def test_a_megabyte_in_one_turn(write):
    path, tokenizer = write([chat("x" * 1_000_000, "five"), chat("y", "six")]), families.qwen()
    bundle = build_datasets(arguments(path, seq_length=64), tokenizer)
    assert bundle.ledger.train.dropped == {"too_long": 1}
    ids, weights = build_datasets(arguments(path, seq_length=1_100_000), tokenizer).train[0]
    assert len(ids) > 100_000 and supervised_text(tokenizer, ids, weights) == "five<|im_end|>"


def test_importing_data_imports_no_megatron():
    code = (
        "import sys, primus_bridge.data.dataset, primus_bridge.data.batches, primus_bridge.data.tokenizer;"
        "assert not any(name.startswith('megatron') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
