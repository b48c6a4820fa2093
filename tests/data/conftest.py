"""A cache of its own for every data test, and arguments for build_datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from primus_bridge.config.arguments import BridgeArguments


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PRIMUS_BRIDGE_CACHE", str(folder))
    return folder


@pytest.fixture
def write(tmp_path):
    """write(rows, name): the rows as JSONL or JSON, and the file's path."""

    def write(rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return str(path)

    return write


def arguments(data_path, *, seq_length: int = 512, stage: str = "sft", seed: int = 1234, **dataset) -> BridgeArguments:
    out = BridgeArguments(stage=stage)
    out.model.seq_length = seq_length
    out.rng.seed = seed
    out.dataset.data_path = str(data_path)
    for name, value in dataset.items():
        assert hasattr(out.dataset, name), name
        setattr(out.dataset, name, value)
    return out


def alpaca_rows(count: int) -> list[dict]:
    return [{"instruction": f"Add {i} and {i}.", "input": "", "output": f"The sum is {2 * i}."} for i in range(count)]
