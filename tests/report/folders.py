"""Save folders as runs leave them, without running anything: for what a report makes of each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from primus_bridge.config import schema, write_run_yaml
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.data.ledger import Counts, Ledger, Sequences, SourceLedger
from primus_bridge.files import write_json
from primus_bridge.report.notes import ENVIRONMENT_FILE, note

ENVIRONMENT = {
    "primus_bridge": "0.1.0",
    "python": "3.11.7 (/venv/bin/python)",
    "system": "Linux-6.1",
    "packages": {"torch": "2.9.0", "datasets": None},
    "devices": {"cpu_cores": 8, "runtime": "ROCm 6.4", "gpus": ["MI300X, 192 GiB"]},
    "optional": [{"name": "wandb", "version": "0.31", "found": True, "use": "tracking"}],
    "patches": [
        {"id": "one", "package": "megatron-core", "installed": "0.16.1", "active": True, "reason": "it needs a GPU"},
        {"id": "two", "package": "megatron-core", "installed": "0.16.1", "active": False, "reason": "unused"},
    ],
}


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A training line of metrics.jsonl."""
    return {
        "step": step,
        "loss": 0.5 + 2.5 * math.exp(-step / 50) + 0.1 * math.sin(step),
        "grad_norm": 1.0 + 0.5 * math.cos(step),
        "lr": 1e-4 * (1 - step / 1e6),
        "supervised_tokens": 600 + step % 7,
        "tokens": 1000 + step % 11,
        "tokens_per_second": 500.0,
        "step_time": 2.0,
        "memory": 3 * 2**30 + step,
        **changes,
    }


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def ledger(**changes: Any) -> Ledger:
    """Two training sources and a held-out part; something of everything lost."""
    first = Counts(
        100, 90, {"too_long": 6, "no_answer": 4}, truncated_samples=9, truncated_tokens=500, tokens=6000,
        supervised=4000, masked=2000,
    )  # fmt: skip
    second, held_out = Counts(20, 20, tokens=1000, supervised=300, masked=700), Counts(5, 5, tokens=50, supervised=50)
    sources = [
        SourceLedger("alpaca.jsonl", "train", "alpaca", "asked for", 2.0, {"train": first}),
        SourceLedger("faq.csv", "train", "alpaca", "seen", counts={"train": second, "validation": held_out}),
    ]
    return Ledger("alpaca", 2048, sources, Sequences(110, False, 7000, 8000), **changes)


def save_folder(folder: Path, steps: int = 20, given: dict[str, Any] | None = None, note_end: bool = True) -> Path:
    """A run of ``steps`` steps on 8 ranks, tensor 2 x pipeline 2. given: more arguments, by dotted name."""
    folder.mkdir(parents=True)
    arguments = BridgeArguments()
    arguments.sources = dict.fromkeys(schema.fields(), "default")
    values = {
        "stage": "sft",
        "checkpoint.save": str(folder),
        "checkpoint.hf_model_name_or_path": "meta-llama/Llama-3.2-1B",
        "train.train_iters": steps,
        "train.micro_batch_size": 1,
        "optimizer.lr": 1e-4,
        "model.tensor_model_parallel_size": 2,
        "model.pipeline_model_parallel_size": 2,
        **(given or {}),
    }
    for number, (name, value) in enumerate(values.items()):
        schema.put(arguments, name, value, f"my.yaml:{number + 1}")
    write_run_yaml(arguments, folder / "run.yaml")
    write_json(folder / "ledger.json", ledger().to_dict())
    write_json(folder / ENVIRONMENT_FILE, ENVIRONMENT)
    write_lines(folder, [line(step) for step in range(1, steps + 1)])
    note(folder, "start", 0, train_iters=steps, ranks=8, notes=[])
    if note_end:
        note(folder, "end", steps, reason=None)
    return folder
