"""The registry and the adapter: by (backend, stage), lazily, with Primus's signatures."""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
from types import SimpleNamespace

import pytest

from primus_bridge.adapter import MegatronBridgeAdapter
from primus_bridge.config import load_arguments
from primus_bridge.errors import ConfigError
from primus_bridge.registry import BackendRegistry


class ToyTrainer:
    """A trainer of a backend of its own, to fill the registry with."""


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(BackendRegistry, "_trainers", dict(BackendRegistry._trainers))
    monkeypatch.setattr(BackendRegistry, "_adapters", dict(BackendRegistry._adapters))
    return BackendRegistry


def test_stages_of_a_backend(registry):
    registry.register_trainer_class(ToyTrainer, "toy")
    registry.register_trainer_class("tests.test_registry:ToyTrainer", "toy", "sft")
    assert registry.get_trainer_class("toy") is ToyTrainer
    assert registry.get_trainer_class("toy", stage="pretrain") is ToyTrainer
    assert registry.get_trainer_class("toy", "sft").__name__ == "ToyTrainer"


def test_unknown_names_list_the_known_ones(registry):
    with pytest.raises(ConfigError, match=r"no stage 'stf'; its stages: pretrain, sft - did you mean 'sft'\?"):
        registry.get_trainer_class("megatron_bridge", "stf")
    with pytest.raises(ConfigError, match=r"no trainer for backend 'megatron-bridge'; known backends: megatron_bridge"):
        registry.get_trainer_class("megatron-bridge")
    with pytest.raises(ConfigError, match="no adapter for backend 'nemo'; known: megatron_bridge"):
        registry.get_adapter("nemo")


def test_signatures_are_those_that_primus_calls():
    def parameters(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "self"}

    empty = inspect.Parameter.empty
    assert parameters(BackendRegistry.register_trainer_class) == {
        "trainer_class": empty,
        "backend": empty,
        "stage": "pretrain",
    }
    assert parameters(BackendRegistry.get_trainer_class) == {"backend": empty, "stage": "pretrain"}
    assert parameters(MegatronBridgeAdapter.load_trainer_class) == {"stage": "pretrain", "trainer_class": None}
    assert parameters(MegatronBridgeAdapter.__init__) == {"framework": "megatron_bridge"}
    assert list(parameters(MegatronBridgeAdapter.convert_config)) == ["params"]


def test_built_in_stages_are_trainers():
    adapter = BackendRegistry.get_adapter("megatron_bridge")
    assert isinstance(adapter, MegatronBridgeAdapter)
    wanted = (
        "backend_args module_name primus_config module_rank module_world_size module_master_addr module_master_port"
    )
    trainers = {stage: adapter.load_trainer_class(stage) for stage in ("pretrain", "sft")}
    assert trainers["pretrain"] is not trainers["sft"]
    assert adapter.load_trainer_class() is trainers["pretrain"]
    for trainer in trainers.values():
        assert set(wanted.split()) <= set(inspect.signature(trainer).parameters)
        assert callable(trainer.run)
    assert adapter.load_trainer_class("sft", trainer_class=ToyTrainer) is ToyTrainer
    assert (
        adapter.load_trainer_class("sft", trainer_class="primus_bridge.trainers.posttrain.SFTTrainer")
        is trainers["sft"]
    )
    with pytest.raises(ConfigError, match="trainer_class: 'SFT' is no dotted path of a trainer"):
        adapter.load_trainer_class("sft", trainer_class="SFT")


def test_adapter_converts_what_primus_merged():
    adapter = MegatronBridgeAdapter()
    params = SimpleNamespace(
        framework="megatron_bridge",
        stage="sft",
        finetune_lr=1e-4,
        hf_path="Qwen/Qwen3-8B",
        peft=SimpleNamespace(dim=8, alpha=16),
        trainable=True,
        packed_sequence=False,
    )
    arguments = adapter.convert_config(params)
    assert vars(arguments)["stage"] == "sft"
    assert (arguments.optimizer.lr, arguments.peft.scheme, arguments.peft.dim) == (1e-4, "lora", 8)
    assert arguments.checkpoint.convert_from_hf is True
    assert arguments.sources["optimizer.lr"] == "Primus module settings"
    assert adapter.convert_config(vars(SimpleNamespace(lr=1))).optimizer.lr == 1.0
    with pytest.raises(ConfigError, match="unknown key 'finetune_lrr'"):
        adapter.convert_config({"finetune_lrr": 1})
    # texts that Primus's command line made of numbers and null
    merged = {"model": "qwen3_8b.yaml", "dataset": {"dataset_name": "squad"}}
    arguments = adapter.convert_config({**merged, "lr": "1e-4", "save_interval": "null", "train_iters": "10"})
    assert arguments.dataset.data_path == "squad"
    assert (arguments.optimizer.lr, arguments.checkpoint.save_interval, arguments.train.train_iters) == (1e-4, None, 10)
    ready = load_arguments(None, [])
    assert adapter.convert_config(ready) is ready


def test_adapter_environment(tmp_path, monkeypatch):
    adapter = MegatronBridgeAdapter()
    assert adapter.detect_backend_version() == importlib.metadata.version("megatron-core")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert adapter.setup_backend_path() == []
    assert adapter.setup_backend_path(tmp_path) == [str(tmp_path)]
    assert sys.path[0] == str(tmp_path)
    assert adapter.setup_backend_path([str(tmp_path)]) == []
    with pytest.raises(ConfigError, match="the backend path is no folder"):
        adapter.setup_backend_path(tmp_path / "gone")
