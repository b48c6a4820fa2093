"""Runs that are killed at random moments come to what the unbroken run does; the long form is kill_resume.py."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from primus_bridge.callbacks.metrics import METRICS_FILE
from primus_bridge.checkpoint.manifest import committed
from primus_bridge.cli.main import main
from primus_bridge.errors import ConfigError
from tests.cli.command import run
from tests.cli.example import alpaca_rows, train_words, workplace, write_rows
from tests.reliability.outcome import PARTS, differences, read_outcome
from tests.reliability.rounds import look


@pytest.mark.slow
def test_killed_runs_come_to_what_the_unbroken_run_does(tmp_path):
    """One round, its first life killed in a save. How far each life comes depends on the machine's load."""
    words = "--kills 3 --kills_a_round 3 --steps 16 --save_interval 2 --command_every 3 --async".split()
    result = run(
        *words,
        *("--only", "LoRA, bf16, DP2", "--seed", "337"),
        *("--folder", str(tmp_path), "--json", str(tmp_path / "kills.json")),
        module="tests.reliability.kill_resume",
        timeout=480,
    )
    assert result.code == 0, result.out + result.err
    found = json.loads((tmp_path / "kills.json").read_text())
    (row,) = found["rows"]
    assert found["faults"] == []
    assert sum(row["kills"].values()) == 3 and row["asynchronous"] == row["rounds"]
    assert row["equal"] == dict.fromkeys(PARTS, True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The save folders of two runs that differ in the seed of data order and dropout."""
    root = tmp_path_factory.mktemp("trained")
    with workplace(root):
        write_rows(root / "rows.json", alpaca_rows(32))
        for seed in (1, 2):
            options = dict(
                seed=seed, hidden_dropout=0.1, save_interval=1, report=False, tensorboard=False, device="cpu"
            )
            assert main(train_words("model", "rows.json", f"seed{seed}", train_iters=2, **options)) == 0
    return root / "seed1", root / "seed2"


def test_what_differs_is_named(trained, tmp_path):
    one, other = trained
    assert differences(read_outcome(one), read_outcome(one)) == {part: [] for part in PARTS}
    found = differences(read_outcome(one), read_outcome(other))
    assert all(found[part] for part in PARTS)
    assert "line 1" in found["losses"] and "embedding.word_embeddings.weight" in found["weights"]
    assert any("rng" in name for name in found["rest"])

    shorter = shutil.copytree(one, tmp_path / "shorter")
    lines = (shorter / METRICS_FILE).read_text().splitlines(keepends=True)
    (shorter / METRICS_FILE).write_text("".join(lines[:-1]))
    assert differences(read_outcome(one), read_outcome(shorter))["losses"] == ["line 2"]


def test_one_changed_bit_counts(trained):
    whole, changed = read_outcome(trained[0]), read_outcome(trained[0])
    name, tensor = next((name, tensor) for name, tensor in changed.optimizer.items() if tensor.dtype == torch.float32)
    tensor.view(torch.int32).reshape(-1)[-1] ^= 1
    assert differences(whole, changed)["optimizer"] == [name]


def test_a_checkpoint_that_is_not_whole_is_seen(trained, tmp_path):
    save = shutil.copytree(trained[0], tmp_path / "save")
    assert look(save).step == 2 and look(save).half == set()
    shard = next(committed(save)[0].glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match=f"{shard.name} differs from its checksum"):
        look(save)
