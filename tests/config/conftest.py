"""write(text, name) puts a file into the test's folder, which is the working folder; refuse(...) is an error's text."""

from __future__ import annotations

import pytest

from primus_bridge.config import load_arguments
from primus_bridge.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return make


@pytest.fixture
def refuse():
    """The whole message of the ConfigError that these arguments of load_arguments raise."""

    def message(path, overrides=(), stage=None) -> str:
        with pytest.raises(ConfigError) as caught:
            load_arguments(path, list(overrides), stage)
        return str(caught.value)

    return message
