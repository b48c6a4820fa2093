"""A tiny model with a tokenizer, a few rows, and the words of a run with them: shared by the tests of the commands."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

from tests import tiny_models
from tests.cli.command import JOB


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of numbers and a few words, with an end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "</s>", *map(str, range(200))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def save_model(folder: Path, kind: str = "llama", **changes) -> Path:
    """A model folder as a user has it: config, weights, tokenizer."""
    tiny_models.save(kind, folder, **changes)
    save_tokenizer(folder)
    return folder


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Stand in ``folder``, which gets model/ and a cache of its own, outside any job and without the hub."""
    with pytest.MonkeyPatch.context() as patch:
        for name in JOB:
            patch.delenv(name, raising=False)
        patch.setenv("PRIMUS_BRIDGE_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(folder)
        save_model(folder / "model")
        yield folder


def alpaca_rows(count: int) -> list[dict]:
    """Rows whose answers have one to four tokens."""
    answers = (" ".join(str((i + k) % 200) for k in range(1 + i % 4)) for i in range(count))
    return [{"instruction": f"say {i}", "input": "", "output": answer} for i, answer in enumerate(answers)]


def write_rows(path: Path, rows: list) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def train_words(model: Path | str, data: Path | str, save: Path | str, **options) -> list[str]:
    """``train ...`` of a small run: fp32 on the CPU, weights from the model folder; options by their short names."""
    chosen = {
        "framework": "megatron_bridge",
        "convert_from_hf": True,
        "hf_model_name_or_path": model,
        "data_path": data,
        "save": save,
        "train_iters": 2,
        "global_batch_size": 4,
        "seq_length": 64,
        "lr": "1e-3",
        **options,
    }
    words = ["train"]
    for name, value in chosen.items():
        if value is not None:
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def loss_lines(save: Path) -> list[dict]:
    """The training lines of SAVE/metrics.jsonl."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def tree(folder: Path) -> dict[str, int]:
    """Every file and folder under ``folder`` with its size (-1 for a folder), hidden ones included."""
    return {str(p.relative_to(folder)): p.stat().st_size if p.is_file() else -1 for p in sorted(folder.rglob("*"))}
