"""A folder to stand in, made from the test file's ``root``, and commands that refuse and leave it as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from primus_bridge.cli.main import main
from tests.cli.example import tree


def linked(place: Path) -> dict[str, dict[str, int]]:
    """What is behind the links, by their names."""
    return {path.name: tree(path) for path in place.iterdir() if path.is_symlink()}


@pytest.fixture
def place(root, tmp_path, monkeypatch):
    """An empty folder to stand in, with links to what is in the test file's ``root``."""
    for path in root.iterdir():
        if path.name != "cache":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(place, capfd):
    """refused(words, *parts): the command fails as it should, its message holds the parts, and nothing was written."""

    def refused(words: list[str], *parts: str) -> str:
        before, shared = tree(place), linked(place)
        capfd.readouterr()
        code = main(words)
        out, err = capfd.readouterr()
        assert code == 2, err + out
        assert err.startswith("primus: ") and err.count("primus: ") == 1 and err.count("\n") == 1, err
        assert "Traceback" not in err + out and "Warning" not in err + out
        for part in parts:
            assert part in err, err
        assert tree(place) == before
        assert linked(place) == shared
        return err

    return refused
