"""Exact match of a Hugging Face folder on the quickstart's held-out questions, answered greedily by transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from primus_bridge.quickstart.model import prompt

MAX_NEW_TOKENS = 16
"""The longest right answer has 8 tokens and EOS."""


@dataclass
class Evaluation:
    """Answers of a model to rows of a question file."""

    rows: list[dict[str, str]]
    answers: list[str]

    @property
    def exact_match(self) -> float:
        """Share of the questions answered with exactly the expected text, 0 to 1."""
        return _share([answer == row["output"] for row, answer in zip(self.rows, self.answers, strict=True)])

    def by_skill(self) -> dict[str, float]:
        """Exact match of each skill, in the order of the file."""
        right: dict[str, list[bool]] = {}
        for row, answer in zip(self.rows, self.answers, strict=True):
            right.setdefault(row["skill"], []).append(answer == row["output"])
        return {skill: _share(values) for skill, values in right.items()}


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def evaluate(hf_folder: Path, question_file: Path, batch_size: int = 100) -> Evaluation:
    """Load the folder with AutoModelForCausalLM and answer every question of the file, until EOS."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = json.loads(question_file.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(str(hf_folder), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(str(hf_folder), dtype=torch.float32).eval()
    prompts = [prompt(row["instruction"], row["input"]) for row in rows]
    answers = [""] * len(rows)
    # prompts of like length share a batch: less padding
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = tokenizer([prompts[index] for index in indices], return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text
    return Evaluation(rows, answers)
