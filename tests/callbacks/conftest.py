"""A place to train in: model/, rows.json, and modules of callbacks that tests write there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.example import alpaca_rows, workplace, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("callbacks")) as root:
        write_rows(root / "rows.json", alpaca_rows(16))
        write_rows(root / "held_out.json", alpaca_rows(22)[16:])
        before = list(sys.path)
        yield root
        sys.path[:] = before  # the current folder is put on it when a callback is imported


@pytest.fixture
def module(root):
    """module(name, text): a file that a dotted path may name; forgotten again afterwards."""
    written = []

    def write(name: str, text: str) -> Path:
        written.append(name)
        path = root / f"{name}.py"
        path.write_text(text)
        return path

    yield write
    for name in written:
        sys.modules.pop(name, None)
        (root / f"{name}.py").unlink()
