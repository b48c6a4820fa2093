"""Dotted paths of the user's: what is imported, and what is said of those that name nothing."""

from __future__ import annotations

import sys

import pytest

from primus_bridge.dotted import imported
from primus_bridge.errors import ConfigError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder to stand in, whose modules are forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_of_the_current_folder(folder):
    (folder / "my_functions.py").write_text("def convert(row):\n    return row\n")
    found = imported("my_functions.convert", "function", example="my_module.convert", where="here")
    assert found("row") == "row"


@pytest.mark.parametrize(
    "path, message",
    [
        ("time.Sampler", "'Sampler' does not exist in Python's own module 'time'"),
        ("time.daylight", "'daylight' is no callback in Python's own module 'time'"),
        ("parts.Sampler", "'Sampler' does not exist in {folder}/parts, a folder: name a module in it, as "
                          "parts.MODULE.NAME"),
        ("whole.Sampler", "'Sampler' does not exist in {folder}/whole.py"),
        ("ends.Sampler", "cannot import 'ends' (from {folder} or the installed packages): "
                         "it ends the program (sys.exit)"),
        ("fails.Sampler", "cannot import 'fails' (from {folder} or the installed packages): KeyError: 'HOME_OF'"),
        ("Sampler", "'Sampler' is no dotted path of a callback, such as my_callbacks.Sampler"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_path(folder, path, message):
    (folder / "parts").mkdir()
    (folder / "whole.py").write_text("")
    (folder / "ends.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "fails.py").write_text("import os\nos.environ['HOME_OF']\n")
    with pytest.raises(ConfigError) as refused:
        imported(path, "callback", example="my_callbacks.Sampler", where="my.yaml:3")
    assert str(refused.value) == "my.yaml:3: " + message.format(folder=folder)
