"""A checkpoint, a model or an adapter from somebody else is data: what would run a command is refused, and not run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from primus_bridge.checkpoint.manifest import find
from primus_bridge.checkpoint.safe_load import load_plain, read_index
from primus_bridge.conversion.hf_weights import HFWeights
from primus_bridge.conversion.peft_folder import PeftFolder
from primus_bridge.errors import ConfigError
from tests import tiny_models
from tests.checkpoint import hostile
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for

TENSOR = "decoder.layers.mlp.linear_fc2.weight"
MOMENT = f"optimizer.state.exp_avg.{TENSOR}"
BYTES = "decoder.layers.mlp.linear_fc2._extra_state/shard_0_4"


def save_once(folder: str, save: str) -> list[str]:
    """A checkpoint of a run; the names of its files."""
    from tests.distributed.rank_functions import train_and_save

    train_and_save(folder, arguments_for({}), save, 0, 1, None)
    return list(find(Path(save)).manifest.files)


def load_each(folder: str, save: str, checkpoints: list[str]) -> list[str]:
    """What resuming from each of the checkpoints says: the refusal, or "loaded"."""
    import torch.distributed.checkpoint as dcp

    from tests.distributed.rank_functions import Built

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # torch's own switch changes nothing
    built = Built(folder, arguments_for({}))
    coordinator, said = built.coordinator(save), []
    for checkpoint in map(Path, checkpoints):
        try:
            coordinator.load(find(checkpoint), built.parallel.layout)
            if checkpoint.name == "bytes":  # which loading leaves out: as others would read them
                dcp.load({BYTES: io.BytesIO()}, checkpoint_id=checkpoint)
            said.append("loaded")
        except ConfigError as error:
            said.append(str(error))
        except dcp.api.CheckpointException as error:
            said.append(str(error.failures[0][0]))
    built.close()
    return said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a model's folder, a save folder with a checkpoint of it, the names of its files)"""
    root = tmp_path_factory.mktemp("hostile")
    folder = tiny_models.save("llama", root / "hf")
    return folder, root / "save", run_distributed(save_once, 1, folder, str(root / "save"))[0]


def test_no_file_of_a_checkpoint_is_executed(saved, tmp_path):
    """Every file that loading reads, with a manifest that fits, in a process whose torch would run it by default."""
    folder, save, files = saved
    harm = tmp_path / "harm"
    command = hostile.Command(f"touch {harm}")
    pickles = [name for name in files if name in (".metadata", "common.pt") or name.startswith("state/")]
    assert {".metadata", "common.pt", "state/rng.rank_00000.pt", "state/scheduler.pt"} <= set(pickles)
    checkpoints = {}

    def copied(name: str) -> Path:
        checkpoints[name] = tmp_path / name.replace("/", "-")
        return Path(shutil.copytree(find(save).folder, checkpoints[name]))

    copied("good")
    for name in pickles:
        hostile.poison(copied(name), name, command)
    for name, entry in {"tensor": TENSOR, "moment": MOMENT, "bytes": BYTES}.items():
        hostile.poison_entry(copied(name), entry, command)
    outside = copied("outside")
    index = hostile.read_index(outside)
    index.storage_data = {key: replace(info, relative_path="../x") for key, info in index.storage_data.items()}
    hostile.write_index(outside, index)
    backend = copied("backend") / "metadata.json"
    backend.write_text(json.dumps(json.loads(backend.read_text()) | {"sharded_backend": "pickle"}))
    hostile.recommit(backend.parent)

    said = run_distributed(load_each, 1, folder, str(save), [str(path) for path in checkpoints.values()])[0]
    said = dict(zip(checkpoints, said, strict=True))
    assert not harm.exists()
    pickle.loads(pickle.dumps(command))  # the pickle does what is said of it
    assert harm.exists()
    assert said.pop("good") == "loaded"
    for name in pickles:
        message = said.pop(name)
        assert message.startswith(f"{checkpoints[name] / name}: damaged or hostile checkpoint: "), message
        assert "posix.system" in message and "nothing was run" in message and "weights_only" not in message, message
    for name in ("tensor", "moment"):
        message = said.pop(name)
        assert message.startswith(f"{checkpoints[name]}: damaged checkpoint: it cannot be read (UnpicklingError: ")
        assert "posix.system" in message and "\n" not in message, message
    message = said.pop("bytes")
    assert message.startswith(f"entry {BYTES} of the checkpoint: damaged or hostile checkpoint") and "posix.system" in (
        message
    )
    assert "outside/.metadata: damaged or hostile checkpoint: its index names a file outside its folder, ../x" in (
        said.pop("outside")
    )
    assert said.pop("backend").startswith(f"{tmp_path / 'backend'}: the checkpoint does not fit this model: ")
    assert not said


@pytest.mark.parametrize("how", ["up", "absolute", "link", "component"])
def test_a_manifest_that_names_files_outside_its_folder(saved, tmp_path, how):
    checkpoint = Path(shutil.copytree(find(saved[1]).folder, tmp_path / "checkpoint"))
    (tmp_path / "x").write_text("somebody else's")
    names = {"up": "../x", "absolute": str(tmp_path / "x"), "link": "linked", "component": "../x"}
    (checkpoint / "linked").symlink_to(tmp_path / "x")
    if how == "component":
        component = next(one for one in find(checkpoint).manifest.components if one["files"])
        hostile.recommit(checkpoint, components=[component | {"files": ["../x"]}])
    else:
        hostile.recommit(checkpoint, files=find(checkpoint).manifest.files | {names[how]: 15})
    with pytest.raises(ConfigError, match=f"hostile checkpoint: it names a file outside its folder, {names[how]}"):
        find(checkpoint)


# --- what a pickle can do within the classes that it may name


def build(target: bytes, attribute: str, value: bytes) -> bytes:
    """A pickle that sets an attribute on what the opcodes ``target`` leave, in the way of an object with __slots__."""
    name = b"X" + len(attribute).to_bytes(4, "little") + attribute.encode()
    return b"\x80\x04" + target + b"N}" + name + value + b"s\x86b."


@pytest.mark.parametrize(
    ("data", "owner", "attribute"),
    [
        (build(b"cpathlib\nPosixPath\n", "is_file", b"ccollections\nOrderedDict\n"), PosixPath, "is_file"),
        (build(b"cpathlib\nPosixPath\n", "new", b"K\x01"), PosixPath, "new"),
        (build(b"ctorch.distributed.checkpoint.metadata\nMetadata\n", "__init__", b"N"), Metadata, "__init__"),
        (
            build(b"ctorch.distributed.checkpoint.planner\nWriteItemType\nK\x01\x85R", "_value_", b"K\x07"),
            WriteItemType.TENSOR,
            "_value_",
        ),
        (
            build(b"ctorch.serialization\n_get_layout\n", "__defaults__", b"K\x01\x85"),
            torch.serialization._get_layout,
            "__defaults__",
        ),
    ],
)
def test_an_index_that_changes_classes_changes_nothing(data, owner, attribute):
    missing = object()
    before, names = getattr(owner, attribute, missing), dir(owner)
    assert pickle.dumps(OrderedDict())  # what the pickle names is there
    with pytest.raises(ConfigError, match=r"^x/.metadata: (hostile checkpoint: its index .* changes|damaged)"):
        read_index(io.BytesIO(data), "x/.metadata")
    assert getattr(owner, attribute, missing) == before and dir(owner) == names
    assert Path(__file__).is_file()


@pytest.mark.parametrize("data", [b"", b"\x80\x04N.", pickle.dumps([1]), pickle.dumps({"a": Metadata}), b"\x80\x04"])
def test_an_index_that_is_none(data):
    with pytest.raises(ConfigError, match="^x/.metadata: damaged checkpoint: its index "):
        read_index(io.BytesIO(data), "x/.metadata")


# --- pickled weights and adapters


def refused(read: Any, path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read(path)
    return str(error.value)


def test_a_flipped_bit_of_a_pickle_never_fails_otherwise():
    """torch's reader itself fails in many ways, such as an IndexError on an empty stack."""
    stream = io.BytesIO()
    torch.save({"step": 3, "a": [torch.ones(2)], "b": OrderedDict(c=(1.5, "d"))}, stream)
    whole, refusals = stream.getvalue(), set()
    first = whole.index(b"\x80\x02")
    for place in range(first, whole.index(b"PK", first)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            try:
                load_plain(io.BytesIO(data), "state.pt")
            except ConfigError as error:
                refusals.add(type(error.__context__))
    assert {IndexError, TypeError} <= refusals


@pytest.mark.parametrize("kind", ["zipped", "old", "plain", "harmless class"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin", "state.pt"])
def test_no_pickled_tensors_are_executed(tmp_path, file, kind):
    path, harm = tmp_path / file, tmp_path / "harm"
    command = hostile.Command(f"touch {harm}")
    if kind == "plain":
        path.write_bytes(pickle.dumps(command))
    else:
        odd = Fraction(1, 2) if kind == "harmless class" else command
        torch.save({"a": torch.ones(1), "b": odd}, path, _use_new_zipfile_serialization=kind != "old")
    if file == "state.pt":
        message = refused(lambda path: load_plain(path, str(path)), path)
        assert message.startswith(f"{path}: damaged or hostile checkpoint: not a file of plain values and tensors (")
    else:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        open_folder = HFWeights if file.startswith("pytorch") else lambda folder: PeftFolder.open(str(folder))
        message = refused(open_folder, tmp_path)
        assert message.startswith(f"{path}: holds more than tensors")
        assert "is not executed: convert the model to safetensors" in message
    named = {"harmless class": "fractions.Fraction", "plain": ""}.get(kind, "posix.system")
    assert named in message and "weights_only" not in message
    assert not harm.exists()
