"""Loader: every epoch every sample once, and a state that any layout and batch size continues."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from primus_bridge.data.dataset import build_datasets
from primus_bridge.data.loader import WholeLoader
from primus_bridge.errors import ConfigError

from . import families
from .conftest import alpaca_rows, arguments
from .test_batches import packed, samples

RECORDED = [8, 1, 6, 2, 0, 3, 5, 7, 4, 9]


def taken(loader, count: int) -> list[int]:
    return [ref.index for ref in loader.next(count)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 7), (5, 16), (100, 8)])
def test_every_epoch_holds_every_sample_once(count, batch, shuffle):
    loader = WholeLoader(samples(count), seed=3, shuffle=shuffle)
    stream = [index for _ in range(3 * count) for index in taken(loader, batch)]
    epochs = [stream[i : i + count] for i in range(0, len(stream) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert (len({tuple(epoch) for epoch in epochs[:5]}) > 1) == shuffle
    assert loader.state() == {"epoch": 3 * batch, "sample": 0, "sequences": count, "digest": None}


def test_ordinals_count_the_run():
    loader = WholeLoader(samples(7), seed=3)
    assert [ref.ordinal for ref in loader.next(20)] == list(range(20))


def test_the_order_does_not_change_with_numpy():
    """Recorded once: a resumed run must meet the same samples after an upgrade."""
    assert taken(WholeLoader(samples(10), seed=1234), 10) == RECORDED


@pytest.mark.parametrize("done", [0, 1, 13, 50, 51, 149])
def test_a_resumed_run_continues_with_the_next_unseen_sample(done):
    data = samples(50)
    unbroken = taken(WholeLoader(data, seed=1), 300)
    loader = WholeLoader(data, seed=1)
    loader.next(done)
    state = json.loads(json.dumps(loader.state()))
    for batch in (1, 8, 24):  # another number of ranks usually means another batch size
        resumed = WholeLoader(data, seed=1)
        assert resumed.load(state) is None
        assert [i for _ in range(3) for i in taken(resumed, batch)] == unbroken[done : done + 3 * batch]
    assert taken(WholeLoader(data, seed=2), 50) != unbroken[:50]


def test_packs_are_the_samples_of_a_packed_set():
    data = packed(40)
    assert sorted(taken(WholeLoader(data, seed=0), data.num_sequences)) == list(range(data.num_sequences))
    assert data.num_sequences < 40


def test_a_manifest_of_before_counts_samples_alone():
    loader = WholeLoader(samples(10), seed=0)
    loader.load({"epoch": 0, "sample": 23})
    assert (loader.epoch, loader.sample) == (2, 3)


def test_other_data_begins_a_new_epoch_and_says_so():
    loader = WholeLoader(samples(10), seed=0)
    loader.next(14)
    more = WholeLoader(samples(12), seed=0)
    note = more.load(loader.state())
    assert note is not None and "12 sequences an epoch, 10 in the checkpoint" in note
    assert (more.epoch, more.sample) == (2, 0)
    loader.next(6)  # the end of an epoch: the one that begins is not passed over
    more.load(loader.state())
    assert (more.epoch, more.sample) == (2, 0)


def test_as_many_other_sequences_begin_a_new_epoch_and_say_so():
    def loader(digest: str | None) -> WholeLoader:
        return WholeLoader(replace(samples(10), digest=digest), seed=0)

    before = loader("one")
    before.next(14)
    for digest, place, said in (("one", (1, 4), False), ("two", (2, 0), True)):
        now = loader(digest)
        note = now.load(before.state())
        assert (now.epoch, now.sample) == place and bool(note) == said
    assert note == "data      the sequences are not those of the checkpoint, though as many: a new epoch begins"
    older = {name: value for name, value in before.state().items() if name != "digest"}
    assert loader("two").load(older) is None  # of before digests were kept


def test_the_digest_is_that_of_the_sequences(write, cache):
    tokenizer, path = families.qwen(), write(alpaca_rows(8))
    digest = build_datasets(arguments(path), tokenizer).train.digest
    moved = write([{**row, "more": 1} for row in alpaca_rows(8)], "moved.jsonl")
    # another file, option and loss of the same tokens in the same places
    same = arguments(moved, loss_on="all", max_dropped_fraction=0.3)
    assert build_datasets(same, tokenizer).train.digest == digest
    assert build_datasets(arguments(path, packed_sequence=True), tokenizer).train.digest != digest
    for meta in (cache / "tokenized").glob("*/meta.json"):  # as an older version left it
        meta.write_text(
            json.dumps({name: value for name, value in json.loads(meta.read_text()).items() if name != "digest"})
        )
    assert build_datasets(arguments(path), tokenizer).train.digest == digest


def test_a_streamed_state_is_refused():
    with pytest.raises(ConfigError, match="streaming: true"):
        WholeLoader(samples(3), seed=0).load({"epoch": 0, "sample": 1, "window": 0})


def test_epoch_inputs_are_in_the_order_of_the_epoch():
    data = samples(20)
    loader = WholeLoader(data, seed=4)
    expected = [data.inputs(ref.index) for ref in WholeLoader(data, seed=4).next(20)]
    assert np.array_equal(loader.epoch_inputs(), expected)
