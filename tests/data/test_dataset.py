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
from primus_bridge.data.formats import Message
from primus_bridge.data.ledger import Ledger
from primus_bridge.errors import ConfigError

from . import families
from .conftest import alpaca_rows, arguments
from .test_templates import encode, supervised_text


def chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def sums_agree(split) -> None:
    assert split.tokens == split.supervised + split.masked
    assert split.rows == split.samples + split.dropped


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
    assert (ledger.format, ledger.template) == ("alpaca", "alpaca")
    assert ledger.train.tokens == bundle.train.lengths.sum() == len(bundle.train.ids)
    assert ledger.train.supervised == bundle.train.loss_weights.sum()
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger
    assert any("supervised" in line for line in ledger.lines())


def test_too_long_is_cut_from_the_left(write):
    tokenizer = families.llama3()
    row = chat("first question " * 30, "first answer", "second question " * 3, "the answer is five")
    row["messages"].insert(0, {"role": "system", "content": "Be kind."})
    path = write([row])
    whole, _ = build_datasets(arguments(path), tokenizer).train[0]
    bundle = build_datasets(arguments(path, seq_length=60), tokenizer)
    ids, weights = bundle.train[0]
    assert len(ids) == 60
    text = tokenizer.decode(ids)
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>")
    assert supervised_text(tokenizer, ids, weights).endswith("the answer is five<|eot_id|>")
    split = bundle.ledger.train
    assert (split.truncated_samples, split.truncated_tokens) == (1, len(whole) - 60)
    sums_agree(split)
    # no room for the system message beside the answer: BOS alone is kept
    needed = int(np.flatnonzero(np.diff(weights) == 1)[-1])
    ids, weights = build_datasets(arguments(path, seq_length=60 - needed + 3), tokenizer).train[0]
    assert ids[0] == tokenizer.bos_token_id and "system" not in tokenizer.decode(ids)
    assert supervised_text(tokenizer, ids, weights) == "the answer is five<|eot_id|>"


def test_an_answer_cut_in_its_middle_is_not_a_target(write):
    tokenizer = families.qwen()
    path = write([chat("q", "one two three four five six seven eight nine ten", "and", "five")])
    whole = build_datasets(arguments(path), tokenizer).train[0]
    for seq_length in range(12, len(whole[0])):
        ids, weights = build_datasets(arguments(path, seq_length=seq_length), tokenizer).train[0]
        assert ids.tolist() == whole[0][-seq_length:].tolist()
        assert supervised_text(tokenizer, ids, weights) in (
            "five<|im_end|>",
            "one two three four five six seven eight nine ten<|im_end|>five<|im_end|>",
        )


def test_an_answer_that_does_not_fit_is_dropped_and_counted(write):
    path = write([chat("q", "long " * 100), chat("q", "short")])
    bundle = build_datasets(arguments(path, seq_length=40), families.qwen())
    assert len(bundle.train) == 1
    assert bundle.ledger.train.dropped_too_long == 1
    sums_agree(bundle.ledger.train)
    with pytest.raises(ConfigError, match="of 2 rows none is left .2 longer than seq_length.*raise model.seq_length"):
        build_datasets(arguments(path, seq_length=4), families.qwen())


def test_drop(write):
    path = write([chat("question " * 40, "a"), chat("q", "short")])
    bundle = build_datasets(arguments(path, seq_length=40, truncation="drop"), families.qwen())
    assert len(bundle.train) == 1 and bundle.ledger.train.dropped_too_long == 1
    assert bundle.ledger.train.truncated_samples == 0
    sums_agree(bundle.ledger.train)
    with pytest.raises(ConfigError, match="truncation: left"):
        build_datasets(arguments(path, seq_length=4, truncation="drop"), families.qwen())


def test_every_token_masked(write):
    # a tokenizer whose template strips an answer of which nothing but a thought is there
    template = families.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(ConfigError) as caught:
        build_datasets(arguments(write([chat("q", "<think>only</think>")])), families.qwen(template))
    assert "row 1" in str(caught.value) and "cannot find the answer" in str(caught.value)


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
    assert (split.rows, split.dropped_empty) == (36, 9)
    assert split.supervised == len(stream) - 1 and split.tokens == split.supervised + split.masked


def test_worker_processes_give_the_same_samples(write):
    path = write(alpaca_rows(2100))
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
    first = build_datasets(arguments(path), families.qwen()).train.ids.tolist()
    changed = open(path).read().replace("Add 1 and 1", "Add 9 and 9")
    open(path, "w").write(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert build_datasets(arguments(path), families.qwen()).train.ids.tolist() != first


def test_a_folder_without_meta_is_not_trusted(write, cache):
    path = write(alpaca_rows(3))
    first = build_datasets(arguments(path), families.qwen())
    (folder,) = (cache / "tokenized").iterdir()
    (folder / "meta.json").unlink()
    (folder / "train.ids.npy").write_bytes(b"half")
    assert np.array_equal(build_datasets(arguments(path), families.qwen()).train.offsets, first.train.offsets)
    assert len(list((cache / "tokenized").iterdir())) == 1


def test_a_failed_build_leaves_nothing(write, cache):
    path = write([*alpaca_rows(3), {"instruction": "x", "output": ""}])
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
    bundle = build_datasets(arguments(write([chat("x" * 1_000_000, "five")]), seq_length=64), families.qwen())
    ids, weights = bundle.train[0]
    assert len(ids) == 64 and supervised_text(families.qwen(), ids, weights) == "five<|im_end|>"


def test_importing_data_imports_no_megatron():
    code = (
        "import sys, primus_bridge.data.dataset, primus_bridge.data.batches, primus_bridge.data.tokenizer;"
        "assert not any(name.startswith('megatron') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
