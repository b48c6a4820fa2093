"""Which of Megatron-Bridge's checkpoints a run goes on from, and whose weights it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from primus_bridge.bridge.start import start_of
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from tests.cli.example import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture
def arguments(model, tmp_path, monkeypatch) -> BridgeArguments:
    monkeypatch.chdir(tmp_path)
    made = BridgeArguments(stage="sft", engine="bridge")
    made.checkpoint.save, made.checkpoint.hf_model_name_or_path = "out", str(model)
    return made


def checkpoint(folder: str, step: int, peft: bool = False, model: str = "m") -> None:
    """What a checkpoint of Megatron-Bridge shows of itself."""
    at = Path(folder) / f"iter_{step:07d}"
    at.mkdir(parents=True)
    config = {"peft": {"dim": 8} if peft else None, "model": {"hf_model_id": model}}
    (at / "run_config.yaml").write_text(yaml.safe_dump(config))
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(step))


def start(arguments: BridgeArguments) -> tuple[str, str | None, bool]:
    found = start_of(arguments)
    return str(found.load), str(found.pretrained) if found.pretrained else None, found.imports


def test_weights_of_a_hugging_face_model_then_the_runs_own_checkpoint(arguments, model):
    arguments.checkpoint.convert_from_hf = True
    assert start(arguments) == ("out", "out/pretrained", True)
    checkpoint("out/pretrained", 0, model=str(model))
    checkpoint("out", 5)
    assert start(arguments) == ("out", "out/pretrained", True)
    checkpoint("elsewhere/pretrained", 0, model="another")
    arguments.checkpoint.save = "elsewhere"
    with pytest.raises(ConfigError, match="^elsewhere/pretrained: holds the weights of another, and the run is of"):
        start_of(arguments)


@pytest.mark.parametrize("place", ["base", "base/iter_0000003"])
def test_a_checkpoint_with_a_pickle_that_megatron_bridge_would_execute(arguments, place):
    checkpoint("base", 3)
    (Path(place) / "modelopt_state").mkdir()
    arguments.checkpoint.load = "base"
    with pytest.raises(ConfigError, match=f"^{place}/modelopt_state: is state of ModelOpt, .* an unrestricted pickle"):
        start_of(arguments)


def test_load_is_continued_or_gives_its_weights(arguments):
    checkpoint("base", 0)
    checkpoint("trained", 7)
    arguments.checkpoint.load = "base"
    assert start(arguments) == ("out", "base", False)
    arguments.checkpoint.load = "trained"
    assert start(arguments) == ("trained", None, False)
    arguments.checkpoint.load = "trained/iter_0000007"
    assert start(arguments) == ("trained", None, False)
    arguments.checkpoint.load = "trained/iter_0000006"
    with pytest.raises(ConfigError, match="^trained/iter_0000006: is not the newest checkpoint of trained"):
        start_of(arguments)
    arguments.checkpoint.load, arguments.checkpoint.finetune = "trained", True
    assert start(arguments) == ("out", "trained", False)
    checkpoint("out", 2)  # a requeued job goes on from its own
    arguments.checkpoint.finetune = False
    assert start(arguments) == ("out", None, False)


def test_adapters_stand_on_weights(arguments):
    arguments.peft.scheme = "lora"
    checkpoint("trained", 7)
    checkpoint("adapter", 3, peft=True)
    arguments.checkpoint.load = "trained"
    assert start(arguments) == ("out", "trained", False)
    arguments.checkpoint.load = "adapter"
    with pytest.raises(ConfigError, match="its adapters need the weights under them: give pretrained_checkpoint too"):
        start_of(arguments)
    arguments.checkpoint.pretrained_checkpoint = "trained"
    assert start(arguments) == ("adapter", "trained", False)
    arguments.checkpoint.pretrained_checkpoint = "adapter"
    with pytest.raises(ConfigError, match="^adapter: holds adapters, not the weights of a model"):
        start_of(arguments)


def test_what_is_no_checkpoint_of_it(arguments):
    Path("empty").mkdir()
    arguments.checkpoint.load = "empty"
    with pytest.raises(ConfigError, match="^empty: no checkpoint of Megatron-Bridge"):
        start_of(arguments)
    checkpoint("broken", 1)
    (Path("broken") / "iter_0000001" / "run_config.yaml").unlink()
    arguments.checkpoint.load = "broken"
    with pytest.raises(ConfigError, match="run_config.yaml: is no checkpoint of Megatron-Bridge"):
        start_of(arguments)
    checkpoint("out", 4, peft=True)
    arguments.checkpoint.load = None
    with pytest.raises(ConfigError, match="^out: holds checkpoints of another kind of run: give another --save"):
        start_of(arguments)
