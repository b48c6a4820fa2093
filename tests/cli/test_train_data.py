"""What the data options do to a run: packed, streamed, weighed, noisy; stopped and resumed at another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from primus_bridge.checkpoint.coordinator import read_state
from primus_bridge.checkpoint.manifest import find
from primus_bridge.cli.main import main
from tests.cli.command import in_rank
from tests.cli.example import alpaca_rows, loss_lines, train_words, workplace, write_rows
from tests.distributed.harness import run_distributed

PACKED = dict(packed_sequence=True, seq_length=64, global_batch_size=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("data")) as root:
        write_rows(root / "rows.jsonl", alpaca_rows(90))
        yield root


def trained(save: str, ranks: int = 1, **options) -> list[dict]:
    """The loss lines of a run of this many ranks."""
    words = train_words("model", "rows.jsonl", save, **options)
    if ranks == 1:
        assert main(words) == 0
    else:
        for result in run_distributed(in_rank, ranks, words):
            assert result.code == 0, result.err
    return loss_lines(Path(save))


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def unbroken(root) -> list[dict]:
    return trained("unbroken", train_iters=6, **PACKED)


def test_a_packed_run_goes_on_at_another_data_parallel_size(unbroken):
    first = trained("resumed", train_iters=3, lr_decay_iters=6, **PACKED)
    assert losses(first) == losses(unbroken)[:3]
    lines = trained("resumed", 2, train_iters=6, **PACKED)
    assert losses(lines) == pytest.approx(losses(unbroken), rel=1e-5)
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in unbroken]
    state = read_state(find(Path("resumed")), "dataset")
    assert (state["epoch"], state["sample"]) == divmod(24, state["sequences"])


def test_packing_is_in_the_ledger(unbroken):
    ledger = json.loads(Path("unbroken/ledger.json").read_text())
    [source] = ledger["sources"]
    assert source["name"] == "rows.jsonl" and source["counts"]["train"]["samples"] == 90
    sequences = ledger["sequences"]
    assert sequences["packed"] and sequences["places"] == 64 * sequences["count"]
    assert sequences["inputs"] == ledger["totals"]["train"]["tokens"] - 90
    assert sequences["padding"] == sequences["places"] - sequences["inputs"]


def test_every_sample_of_an_epoch_is_trained_on_once(root):
    lines = trained("epoch", train_iters=9, global_batch_size=10)
    packs = json.loads(Path("unbroken/ledger.json").read_text())["totals"]["train"]
    assert sum(line["tokens"] for line in lines) == packs["tokens"]
    assert sum(line["supervised_tokens"] for line in lines) == packs["supervised"]


def test_a_stream_trains_on_the_same_rows_and_resumes_on_two_ranks(root):
    options = dict(streaming=True, streaming_window=32, global_batch_size=10)
    whole = trained("streamed", train_iters=12, **options)
    ledger = json.loads(Path("streamed/ledger.json").read_text())
    assert ledger["streaming"] and ledger["totals"]["train"]["rows"] == 90  # the last window was read, none twice
    first = trained("stopped", train_iters=5, lr_decay_iters=12, **options)
    assert losses(first) == losses(whole)[:5]
    state = read_state(find(Path("stopped")), "dataset")
    assert (state["epoch"], state["sample"], state["window"]) == (0, 50, 1)
    lines = trained("stopped", 2, train_iters=12, **options)
    assert losses(lines) == pytest.approx(losses(whole), rel=1e-5)
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in whole]


def test_a_weighted_prompt_changes_the_loss_and_counts_its_tokens(root, unbroken):
    plain = trained("plain", train_iters=1, global_batch_size=10)
    weighed = trained("weighed", train_iters=1, global_batch_size=10, prompt_loss_weight=0.5)
    assert weighed[0]["tokens"] == plain[0]["tokens"]
    assert weighed[0]["supervised_tokens"] == weighed[0]["tokens"] - 10  # all but the first token of each sample
    assert weighed[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)


def test_noise_is_in_training_and_the_same_at_another_layout(unbroken):
    noisy = trained("noisy", train_iters=3, neftune_noise_alpha=5, **PACKED)
    assert all(a != pytest.approx(b, rel=1e-4) for a, b in zip(losses(noisy), losses(unbroken), strict=False))
    options = dict(tensor_model_parallel_size=2, sequence_parallel=True)
    assert losses(trained("noisy2", 2, train_iters=3, neftune_noise_alpha=5, **PACKED, **options)) == pytest.approx(
        losses(noisy), rel=1e-5
    )


def test_a_run_that_would_lose_too_much_starts_nothing(root, capfd):
    rows = alpaca_rows(4) + [{"instruction": "1 " * 100, "output": "2"}] * 6
    write_rows(root / "long.jsonl", rows)
    assert main(train_words("model", "long.jsonl", "lost", seq_length=64)) == 2
    err = capfd.readouterr().err
    assert "6 of 10 train samples are lost (6 longer than seq_length), more than max_dropped_fraction 0.5" in err
    assert not Path("lost").exists()
