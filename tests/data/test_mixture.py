"""Several sources: their options, their weights, one template, and a ledger of each."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from primus_bridge.config.validate import validate_data
from primus_bridge.data.dataset import build_datasets
from primus_bridge.data.loader import WholeLoader
from primus_bridge.data.mixture import epoch_samples, train_sources
from primus_bridge.errors import ConfigError

from . import families
from .conftest import alpaca_rows, arguments


def mixed(sources, **options):
    asked = arguments(None, sources=sources, **options)
    asked.dataset.data_path = None
    return asked


def test_epoch_samples_by_weight():
    sources = np.array([0] * 10 + [1] * 8)
    assert epoch_samples(sources, [1.0, 1.0], [0], part=False) is None
    counts = Counter(epoch_samples(sources, [2.0, 0.25], [0], part=False).tolist())
    assert all(counts[i] == 2 for i in range(10)) and sum(counts[i] for i in range(10, 18)) == 2
    half = Counter(epoch_samples(sources, [1.5, 1.0], [0], part=False).tolist())
    assert sorted(half[i] for i in range(10)) == [1] * 5 + [2] * 5
    by_seed = [epoch_samples(sources, [0.5, 1], [seed], part=False).tolist() for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
    # a small weight gives one sample at least; of windows, its share in all of them together
    assert len(epoch_samples(sources[:10], [0.01], [0], part=False)) == 1
    shares = [len(epoch_samples(sources[:10], [0.05], [0, window], part=True)) for window in range(400)]
    assert set(shares) == {0, 1} and 150 < sum(shares) < 250


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_holds_each_source_as_often_as_its_weight(write, packed):
    a, b = write(alpaca_rows(10), "a.jsonl"), write(alpaca_rows(8), "b.json")
    asked = mixed([{"path": a, "weight": 3, "name": "sums"}, {"path": b, "weight": 0.5}], packed_sequence=packed)
    bundle = build_datasets(asked, families.qwen())
    data = bundle.train
    refs = WholeLoader(data, 0).next(data.num_sequences)
    origins = Counter(data.origin(int(m)).source for ref in refs for m in data.members(ref.index))
    assert origins == {0: 30, 1: 4}
    assert [(s.name, s.counts["train"].samples) for s in bundle.ledger.sources] == [("sums", 10), ("b.json", 8)]
    lines = "\n".join(bundle.ledger.lines())
    assert "weight 3" in lines and "sums" in lines and "34" in lines or packed


def test_each_source_has_its_own_format_and_columns(write):
    a = write([{"question": "What is 2?", "answer": "two"}], "a.jsonl")
    b = write(alpaca_rows(2), "b.jsonl")
    sources = [
        {"path": a, "dataset_format": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
        {"path": b, "max_samples": 1},
    ]
    bundle = build_datasets(mixed(sources), families.qwen())
    decoded = [families.qwen().decode(bundle.train[i][0]) for i in range(len(bundle.train))]
    assert len(decoded) == 2 and "What is 2?" in decoded[0] and "two" in decoded[0]


def test_formats_with_different_templates_need_a_named_one(write):
    a = write(alpaca_rows(2), "a.jsonl")
    b = write([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], "b.jsonl")
    with pytest.raises(
        ConfigError, match="different templates .a.jsonl: alpaca, b.jsonl: chat_template.*prompt_template"
    ):
        build_datasets(mixed([{"path": a}, {"path": b}]), families.qwen())
    bundle = build_datasets(mixed([{"path": a}, {"path": b}], prompt_template="chatml"), families.qwen())
    assert len(bundle.train) == 3 and bundle.ledger.template == "chatml"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"weight": 2}], "source 1 of dataset.sources has no path"),
        ([{"path": "a"}, {"path": "b", "wieght": 2}], "unknown key 'wieght' in source 2.*did you mean 'weight'"),
        ([{"path": "a", "weight": 0}], "weight 0 of source 1"),
        ([{"path": "a", "weight": True}], "weight True of source 1"),
        ([{"path": "a", "max_samples": "many"}], "'max_samples in source 1.*must be a whole number"),
        ([{"path": "a", "custom_format": {"user": "u"}}], "custom_format of source 1 .* is for dataset_format: custom"),
        ([{"path": "a", "columns": "x"}], "'columns in source 1.*must be a mapping"),
    ],
)
def test_what_a_source_cannot_be(sources, message):
    with pytest.raises(ConfigError, match=message):
        train_sources(mixed(sources).dataset)


def test_a_path_and_sources_are_one_too_many(write):
    asked = arguments(write(alpaca_rows(2)), sources=[{"path": "b"}])
    with pytest.raises(ConfigError, match="data_path .* and sources are both set"):
        validate_data(asked)


def test_validation_split_takes_from_every_source(write):
    a, b = write(alpaca_rows(20), "a.jsonl"), write(alpaca_rows(30), "b.jsonl")
    bundle = build_datasets(mixed([{"path": a}, {"path": b}], validation_split=0.1), families.qwen())
    assert [s.counts["validation"].samples for s in bundle.ledger.sources] == [2, 3]
    assert (len(bundle.train), len(bundle.validation)) == (45, 5)
