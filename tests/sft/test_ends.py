"""How runs end: early, beyond their length, with an export that fails; epochs counted on from another batch size."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path

import pytest

from primus_bridge import Callback, SFTConfig, SFTTrainer, SharingPattern, StateComponent, ValidationCallback
from primus_bridge.errors import ConfigError
from tests.cli.example import alpaca_rows, loss_lines, workplace, write_rows

CONFIG = dict(
    base_model="model",
    dataset_name="rows.json",
    dataset_format="alpaca",
    batch_size=1,
    learning_rate=1e-3,
    max_seq_length=64,
    report_to="none",
)


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("ends")) as root:
        write_rows(root / "rows.json", alpaca_rows(40))
        yield root


def train(save: str, *callbacks: Callback, **fields):
    return SFTTrainer(SFTConfig(**{**CONFIG, "output_dir": save, **fields}), callbacks=list(callbacks)).train()


def test_a_program_may_train_again_and_again():
    """Each run's model, groups and threads go with it."""
    others = models()  # what other tests of this process still hold is not this one's to count
    threads = []
    for number in range(3):
        train(f"again{number}", max_steps=1, convert_to_hf=False)
        gc.collect()
        threads.append(threading_count())
    assert threads[2] <= threads[1] <= threads[0] + 2
    assert not models() - others


def models() -> weakref.WeakSet:
    """Every GPTModel that this process holds."""
    gc.collect()
    return weakref.WeakSet(one for one in gc.get_objects() if type(one).__name__ == "GPTModel")


def threading_count() -> int:
    """Of this process, those of gloo included."""
    return len(os.listdir("/proc/self/task"))


def manifest(save: str, step: int) -> dict:
    return json.loads(Path(save, f"iter_{step:07d}", "manifest.json").read_text())


def test_a_run_that_stops_by_itself_is_exported_and_one_beyond_its_length_too(capsys):
    # no loss can get lower by so much: the second evaluation ends it
    patience = ValidationCallback(eval_steps=1, patience=1, min_delta=100.0)
    result = train("early", patience, max_steps=6, validation_split=0.2, logging_steps=10)
    assert result["steps"] == 2 and result["stop_reason"].startswith(
        f"1 evaluation brought no loss lower by more than 100 than {patience.best.loss:.4f} at step 1"
    )
    # what it did is logged, between two log steps as it is
    (line,) = loss_lines(Path("early"))
    assert line["step"] == 2 and result["train_loss"] == line["loss"] and Path("early/loss.png").is_file()
    assert line["tokens_per_second"] * line["step_time"] * 2 == pytest.approx(result["tokens"])
    assert f"step 2/6  loss {line['loss']:>8.4f}" in capsys.readouterr().out
    assert result["hf_folder"] == "early/hf" and Path("early/hf/model.safetensors").is_file()
    beyond = train("early", max_steps=1, validation_split=0.2, hf_save_path="again")
    assert beyond["steps"] == 2 and Path(beyond["hf_folder"], "model.safetensors").is_file()


def test_epochs_are_counted_on_at_another_batch_size():
    first = train("epochs", num_epochs=2, gradient_accumulation_steps=4, save_steps=4, exit_after_save=True)
    assert first["steps"] == 4 and first["hf_folder"] is None
    assert manifest("epochs", 4)["consumed_samples"] == 16
    last = train("epochs", num_epochs=2, gradient_accumulation_steps=8)
    assert last["steps"] == 4 + (80 - 16) // 8
    assert manifest("epochs", 12)["consumed_samples"] == 80
    assert ">2</dd>" in Path("epochs/report.html").read_text().partition("Epochs")[2][:80]


class Ema:
    def __init__(self):
        self.rate = 0.5

    def state_dict(self) -> dict:
        return {"rate": self.rate}

    def load_state_dict(self, state: dict) -> None:
        self.rate = state["rate"]


def test_state_of_the_callers_own_goes_with_the_run():
    def run(ema: Ema, **fields):
        config = SFTConfig(**{**CONFIG, "output_dir": "own", "max_steps": 2, "convert_to_hf": False, **fields})
        return SFTTrainer(config, state_components=[StateComponent("ema", ema, SharingPattern.REPLICATED)]).train()

    first, second = Ema(), Ema()
    first.rate = 0.25
    run(first, save_steps=1, exit_after_save=True)
    assert run(second)["steps"] == 2 and second.rate == 0.25
    with pytest.raises(ConfigError, match="state_components is a list of StateComponent"):
        SFTTrainer(SFTConfig(**CONFIG), state_components=[first])


class Blocks(Callback):
    """Puts a file where the export goes, and hears how the run ends."""

    def __init__(self):
        self.heard: list[str] = []

    def on_step_end(self, state, metrics):
        Path("blocked/hf").write_text("mine")

    def on_error(self, state, error):
        self.heard.append(type(error).__name__)

    def on_train_end(self, state):
        self.heard.append("end")


def test_an_export_that_fails_is_a_failure():
    blocks = Blocks()
    with pytest.raises(ConfigError, match="hf"):
        train("blocked", blocks, max_steps=1)
    assert blocks.heard in (["ConfigError"], ["SharedError"])
    assert "Failed after step 1 of 1" in Path("blocked/report.html").read_text()
