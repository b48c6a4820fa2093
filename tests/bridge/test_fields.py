"""The tables of fields: no argument is forgotten, and an unknown version or a missing package says what to do."""

from __future__ import annotations

import importlib.metadata

import pytest

from primus_bridge.bridge import engine
from primus_bridge.bridge.fields import TABLES, To, check_fields, table_of
from primus_bridge.cli.main import main
from primus_bridge.config import load_arguments, schema
from primus_bridge.errors import ConfigError


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.versions)
def test_every_argument_has_its_place(table):
    assert set(table.fields) == set(schema.fields())
    fields = [field for entry in table.fields.values() if isinstance(entry, To) for field in entry.fields]
    fields += table.fixed
    assert len(fields) == len(set(fields))  # no field is set twice
    assert {field.partition(".")[0] for field in fields} == {
        *table.sections,
        "model",
        "dataset",
        "peft",
        "mixed_precision",
    }


def test_versions():
    assert table_of("0.3.1") is TABLES[0] and table_of("0.6.2+cu13") is TABLES[1]
    with pytest.raises(ConfigError, match=r">=0.3,<0.4 \(Python 3.11\), >=0.6,<0.7 \(Python 3.12\), and 0.5.0 is"):
        table_of("0.5.0")


def test_notes_and_refusals():
    words = "--data_path x --save out --hf_model_name_or_path m --convert_from_hf".split()
    arguments = load_arguments(None, [*words, "--logger.progress", "false"])
    check_fields(arguments, TABLES[0])
    assert arguments.notes == [
        "command line --logger.progress: 'progress' has no effect here: engine bridge prints lines of its own"
    ]
    arguments = load_arguments(None, [*words, "--neftune_noise_alpha", "5"])
    with pytest.raises(ConfigError, match="^command line --neftune_noise_alpha: 'neftune_noise_alpha' cannot be 5.0"):
        check_fields(arguments, TABLES[0])


def test_without_the_package(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(engine.importlib.metadata, "version", missing)
    monkeypatch.chdir(tmp_path)
    words = "--engine bridge --data_path x --save out --hf_model_name_or_path m --convert_from_hf".split()
    assert main(["train", *words]) == 2
    assert "engine bridge needs megatron-bridge, which is not installed: pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert engine.usable().startswith("engine bridge needs megatron-bridge, which is not installed")  # primus doctor
