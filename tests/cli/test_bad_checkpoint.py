"""Checkpoints that are damaged, hostile, of another kind or not there: one message, exit code 2, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from primus_bridge.cli.main import main
from tests.checkpoint import hostile
from tests.cli.example import alpaca_rows, train_words, workplace, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, data, and committed runs: full (two checkpoints) and LoRA."""
    with workplace(tmp_path_factory.mktemp("bad_checkpoint")) as root:
        write_rows(root / "rows.json", alpaca_rows(16))
        assert main(train_words("model", "rows.json", "full")) == 0
        assert main(train_words("model", "rows.json", "lora", use_lora=True, lora_rank=4, convert_to_hf=True)) == 0
        yield root


def test_no_checkpoint_to_load(place, refused):
    (place / "empty").mkdir()
    load = train_words("model", "rows.json", "out", convert_from_hf=None, hf_model_name_or_path=None)
    refused([*load, "--load", "empty"], "empty: holds no committed checkpoint", "primus.cli.convert")
    refused([*load, "--load", "gone"], "gone: no such checkpoint folder")
    refused("convert --convert_to_hf --load empty --hf_save_path hf".split(), "empty: holds no committed checkpoint")


def copied(name: str) -> Path:
    """The newest checkpoint of a run, copied to ./copy."""
    return Path(shutil.copytree(Path(name) / "iter_0000002", "copy"))


LOAD = train_words("model", "rows.json", "out", convert_from_hf=None, load="copy")
EXPORT = "convert --convert_to_hf --load copy --hf_save_path hf".split()


def test_damaged_checkpoint(place, refused):
    shard = next(copied("full").glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    refused(EXPORT, f"copy: damaged checkpoint: {shard.name} should have {len(whole)} bytes, it is {len(whole) - 10}")
    refused(LOAD, "damaged checkpoint", shard.name)
    shard.unlink()
    refused(EXPORT, "damaged checkpoint", shard.name, "missing")
    (place / "copy" / "manifest.json").write_text("{")
    refused(EXPORT, "copy: damaged checkpoint: manifest.json is not a manifest of a checkpoint")


@pytest.mark.parametrize("name", [".metadata", "state/rng.rank_00000.pt"])
def test_a_checkpoint_is_never_executed(place, refused, name):
    """Said as any bad input is; that no other file is executed either: tests/checkpoint/test_hostile.py."""
    hostile.poison(copied("full"), name, hostile.Command(f"touch {place / 'executed'}"))
    refused(LOAD, f"copy/{name}: damaged or hostile checkpoint", "posix.system", "nothing was run")


def test_a_checkpoint_with_a_scrambled_shard(place, refused):
    shard = next(copied("full").glob("*.distcp"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    refused(EXPORT, "copy: damaged checkpoint")


def test_save_folder_of_another_kind_of_run(place, refused):
    words = train_words("model", "rows.json", "full", use_lora=True)
    refused(words, "full: holds checkpoints of another kind of run (stage sft, all weights)", "give another --save")
    refused(
        train_words("model", "rows.json", "lora"),
        "lora: holds checkpoints of another kind of run",
        "LoRA rank 4, alpha 32 on",
    )
    other_rank = train_words("model", "rows.json", "lora", use_lora=True, lora_rank=8)
    refused(other_rank, "another kind of run", "LoRA rank 4, alpha 32 on")


def test_an_adapter_is_no_model(place, refused):
    refused(
        train_words("model", "rows.json", "out", convert_from_hf=None, load="lora"),
        "lora/iter_0000002: holds only a LoRA adapter",
        "--merge",
    )
    refused(train_words("lora/hf", "rows.json", "out"), "lora/hf: ", "adapter")
