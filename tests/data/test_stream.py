"""Streaming: windows in the order of the rows, every row once an epoch, a state that resumes anywhere."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from primus_bridge.config.validate import validate_data
from primus_bridge.data import stream as stream_module
from primus_bridge.data.dataset import build_datasets
from primus_bridge.data.loader import open_loader
from primus_bridge.errors import ConfigError

from . import families
from .conftest import alpaca_rows, arguments


def opened(path, seed=7, **options):
    asked = arguments(path, streaming=True, streaming_window=8, seed=seed, **options)
    bundle = build_datasets(asked, families.qwen())
    return bundle, open_loader(bundle.train, seed, shuffle=True)


def texts(refs) -> list[str]:
    out = []
    for ref in refs:
        for member in ref.data.members(ref.index):
            out.append(families.qwen().decode(ref.data[int(member)][0]))
    return out


def whole_texts(path, **options) -> list[str]:
    data = build_datasets(arguments(path, **options), families.qwen()).train
    return [families.qwen().decode(data[i][0]) for i in range(len(data))]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 27])
@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_is_the_whole_set(write, count, packed):
    path = write(alpaca_rows(count))
    _, loader = opened(path, packed_sequence=packed)
    first, seen = loader.next(1), []
    while loader.state()["epoch"] == 0:
        seen += loader.next(1)
    epoch = texts(first) + texts(seen)
    assert sorted(epoch) == sorted(whole_texts(path))
    # a window is shuffled by itself, and comes before the next
    for start in range(0, count, 8):
        assert sorted(epoch[start : start + 8]) == sorted(whole_texts(path)[start : start + 8])
    second = [ref for ref in loader.next(len(first) + len(seen))]
    assert sorted(texts(second)) == sorted(epoch) and (count < 4 or packed or texts(second) != epoch)
    assert loader.state()["epoch"] == 2


@pytest.mark.parametrize("done", [0, 3, 8, 11, 27, 30, 55])
@pytest.mark.parametrize("cached", [True, False])
def test_a_resumed_stream_continues_with_the_next_unseen_sample(write, cache, done, cached, monkeypatch):
    if not cached:  # no thread writes where the test removes
        monkeypatch.setattr(stream_module.Stream, "prefetch", lambda self, begin: None)
    path = write(alpaca_rows(27))
    _, loader = opened(path)
    unbroken = texts(loader.next(100))
    _, loader = opened(path)
    loader.next(done)
    state = json.loads(json.dumps(loader.state()))
    assert len(list((cache / "tokenized").iterdir())) <= 4  # windows that were passed are gone
    assert (state["epoch"], state["sample"]) == divmod(done, 27)
    if not cached:
        shutil.rmtree(cache / "tokenized")
    for batch in (1, 10):
        _, resumed = opened(path)
        assert resumed.load(state) is None
        assert [t for _ in range(4) for t in texts(resumed.next(batch))] == unbroken[done : done + 4 * batch]
        assert resumed.next(1)[0].ordinal == done + 4 * batch


def test_rows_before_the_place_are_not_tokenised_again(write, cache, monkeypatch):
    path = write(alpaca_rows(40))
    monkeypatch.setattr(stream_module.Stream, "prefetch", lambda self, begin: None)
    _, loader = opened(path)
    loader.next(33)
    state = loader.state()
    shutil.rmtree(cache / "tokenized")
    built = []
    build = stream_module.Stream._build
    monkeypatch.setattr(
        stream_module.Stream, "_build", lambda self, to, begin: built.append(begin) or build(self, to, begin)
    )
    _, resumed = opened(path)
    resumed.load(state)
    resumed.next(4)
    assert built == [[0], [32]]  # the first window is what a run begins with; then the one of the place


def test_several_sources_share_a_window(write):
    a, b = (
        write(alpaca_rows(10), "a.jsonl"),
        write([{"instruction": f"q{i}", "output": f"b{i}"} for i in range(3)], "b.jsonl"),
    )
    asked = arguments(None, streaming=True, streaming_window=4, sources=[{"path": a}, {"path": b, "weight": 2}])
    asked.dataset.data_path = None
    bundle = build_datasets(asked, families.qwen())
    loader = open_loader(bundle.train, 7, shuffle=False)
    seen = []
    while loader.state()["epoch"] == 0:
        seen += texts(loader.next(1))
    assert sum("The sum is" in text for text in seen) == 10 and sum("\nb" in text for text in seen) == 6
    assert sum("\nb" in text for text in seen[:6]) == 4  # two rows of each, b's twice
    assert [source.counts["train"].rows for source in bundle.ledger.sources] == [10, 3]


def test_the_ledger_grows_with_what_is_read_and_counts_each_row_once(write):
    bundle, loader = opened(write(alpaca_rows(20)))
    assert bundle.ledger.train.rows == 8 and bundle.ledger.streaming
    loader.next(50)
    assert bundle.ledger.train.rows == bundle.ledger.train.samples == 20
    assert any("so far" in line for line in bundle.ledger.lines())


def test_a_bad_row_of_a_later_window_stops_when_it_is_met(write):
    path = write([*alpaca_rows(12), {"instruction": "x", "output": 5}])
    _, loader = opened(path)
    loader.next(8)
    with pytest.raises(ConfigError, match="rows.jsonl:13: row 13, column 'output'"):
        loader.next(1)


def test_a_later_window_of_losses_stops_the_run(write):
    long = [{"instruction": "x", "output": "word " * 600}] * 30
    path = write([*alpaca_rows(8), *long])
    _, loader = opened(path)
    with pytest.raises(ConfigError, match="samples are lost"):
        loader.next(40)


def test_a_window_without_samples_is_passed_over(write):
    long = [{"instruction": "x", "output": "word " * 600}] * 8
    path = write([*alpaca_rows(8), *long, *alpaca_rows(8)])
    _, loader = opened(path, max_dropped_fraction=0.9)
    assert len(texts(loader.next(16))) == 16 and loader.state()["epoch"] == 1


def test_validation_is_read_whole(write):
    held = write(alpaca_rows(11), "held.json")
    bundle, _ = opened(write(alpaca_rows(20)), validation_data_path=held)
    assert len(bundle.validation) == 11 and bundle.ledger.validation.samples == 11


def test_a_fraction_for_validation_is_refused(write):
    with pytest.raises(ConfigError, match="streaming never has it: give validation_data_path"):
        validate_data(arguments(write(alpaca_rows(3)), streaming=True, validation_split=0.1))


def test_a_state_without_streaming_is_refused(write):
    _, loader = opened(write(alpaca_rows(3)))
    with pytest.raises(ConfigError, match="without dataset.streaming"):
        loader.load({"epoch": 0, "sample": 1})


@pytest.mark.parametrize("change", [{"packed_sequence": True}, {"seq_length": 256}, {"more": True}])
def test_a_place_in_another_stream_is_a_new_epoch_and_says_so(write, change):
    path = write(alpaca_rows(20))
    _, loader = opened(path)
    loader.next(11)
    state = loader.state()
    if change == {"more": True}:
        path, change = write(alpaca_rows(21), "more.jsonl"), {}
    _, resumed = opened(path, **change)
    assert "a new epoch begins" in (resumed.load(state) or "")
    resumed.next(1)
    assert (resumed.state()["epoch"], resumed.state()["sample"]) == (1, 1)


def test_a_copy_of_the_files_is_the_same_stream(write, tmp_path):
    path = write(alpaca_rows(20))
    _, loader = opened(path)
    loader.next(11)
    (tmp_path / "elsewhere").mkdir()
    copied = shutil.copy(path, tmp_path / "elsewhere" / "rows.jsonl")
    os.utime(copied, (1, 1))
    _, resumed = opened(copied)
    assert resumed.load(loader.state()) is None
    assert texts(resumed.next(20)) == texts(loader.next(20))


def test_batches_larger_than_windows(write):
    path = write(alpaca_rows(30))
    _, loader = opened(path)
    assert sorted(texts(loader.next(25) + loader.next(5))) == sorted(whole_texts(path))


def test_a_light_source_comes_in_its_share_of_the_windows(write):
    a = write(alpaca_rows(160), "a.jsonl")
    b = write([{"instruction": f"q{i}", "output": f"b{i}"} for i in range(160)], "b.jsonl")
    sources = [{"path": a}, {"path": b, "weight": 0.1}]
    asked = arguments(None, streaming=True, streaming_window=8, sources=sources)
    asked.dataset.data_path = None
    loader = open_loader(build_datasets(asked, families.qwen()).train, 7, shuffle=True)
    seen = []
    while loader.state()["epoch"] == 0:
        seen += texts(loader.next(1))
    assert 8 <= sum("\nb" in text for text in seen) <= 24  # 16 are expected


def test_validation_beside_other_sources(write):
    a, b, held = (write(alpaca_rows(n), f"{n}.jsonl") for n in (20, 12, 5))
    for sources in ([{"path": a}], [{"path": a}, {"path": b}]):
        asked = arguments(None, streaming=True, streaming_window=8, sources=sources, validation_data_path=held)
        asked.dataset.data_path = None
        bundle = build_datasets(asked, families.qwen())
        assert len(bundle.validation) == 5 and bundle.validation.origin(0).source == len(sources)
        assert bundle.ledger.validation.samples == 5


def test_a_changed_file_is_another_stream(write):
    path = write(alpaca_rows(6))
    _, loader = opened(path)
    before = texts(loader.next(6))
    text = open(path).read().replace("Add 1 and 1", "Add 9 and 9")
    stat = os.stat(path)
    open(path, "w").write(text)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))  # same size
    _, loader = opened(path)
    assert sorted(texts(loader.next(6))) != sorted(before)
