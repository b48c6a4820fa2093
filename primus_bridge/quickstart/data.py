"""The quickstart's data: a program writes alpaca-shaped questions of six skills with their answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TRAIN_ROWS = {"addition": 700, "subtraction": 700, "reversing": 1500, "sorting": 1500, "look-up": 1500, "units": 600}
"""Training questions of each skill: the two that need the most practice have the most."""
HELDOUT_ROWS = 50
"""Held-out questions of each skill."""

# capital letters and digits are one token each (model.py), so that every skill is about tokens the model can see
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNITS = (
    ("km", "m", 1000),
    ("kg", "g", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("m", "km", -1000),
    ("g", "kg", -1000),
    ("cm", "m", -100),
    ("mm", "cm", -10),
)
"""(from, to, factor); a negative factor divides."""


class Question(NamedTuple):
    skill: str
    instruction: str
    input: str
    output: str
    key: tuple
    """What is asked, whatever its wording: equal keys never lie in both training and held-out questions."""

    def row(self) -> dict[str, str]:
        """The alpaca row, with the skill beside it."""
        return {"instruction": self.instruction, "input": self.input, "output": self.output, "skill": self.skill}


def addition(rng: random.Random) -> Question:
    a, b = rng.randrange(10, 100), rng.randrange(1, 10)
    return Question("addition", f"What is {a} + {b}?", "", str(a + b), (a, b))


def subtraction(rng: random.Random) -> Question:
    a, b = rng.randrange(10, 100), rng.randrange(1, 10)
    return Question("subtraction", f"What is {a} - {b}?", "", str(a - b), (a, b))


def reversing(rng: random.Random) -> Question:
    letters = "".join(rng.sample(LETTERS, rng.randint(3, 5)))
    return Question("reversing", "Write the letters in reverse order.", letters, letters[::-1], (letters,))


def sorting(rng: random.Random) -> Question:
    digits = "".join(rng.sample("0123456789", rng.randint(3, 5)))
    return Question("sorting", "Sort the digits from small to large.", digits, "".join(sorted(digits)), (digits,))


def look_up(rng: random.Random) -> Question:
    names = rng.sample(LETTERS, rng.randint(3, 5))
    values = [rng.randrange(10) for _ in names]
    asked = rng.randrange(len(names))
    table = " ".join(f"{name}{value}" for name, value in zip(names, values, strict=True))
    return Question(
        "look-up", f"Look up the letter in the table {table}.", names[asked], str(values[asked]), (table, names[asked])
    )


def units(rng: random.Random) -> Question:
    source, target, factor = rng.choice(UNITS)
    number = rng.randrange(10, 100)
    given, answer = (number, number * factor) if factor > 0 else (number * -factor, number)
    return Question(
        "units", f"Convert {given} {source} to {target}.", "", f"{answer} {target}", (given, source, target)
    )


SKILLS: dict[str, Callable[[random.Random], Question]] = {
    "addition": addition,
    "subtraction": subtraction,
    "reversing": reversing,
    "sorting": sorting,
    "look-up": look_up,
    "units": units,
}


def questions(seed: int) -> tuple[list[Question], list[Question]]:
    """(training, held-out) questions, no key twice within a skill; the same ones for the same seed."""
    train: list[Question] = []
    heldout: list[Question] = []
    for skill, ask in SKILLS.items():
        rng = random.Random(f"{seed} {skill}")
        distinct: dict[tuple, Question] = {}
        while len(distinct) < TRAIN_ROWS[skill] + HELDOUT_ROWS:
            question = ask(rng)
            distinct.setdefault(question.key, question)
        drawn = list(distinct.values())
        heldout += drawn[:HELDOUT_ROWS]
        train += drawn[HELDOUT_ROWS:]
    random.Random(f"{seed} order").shuffle(train)
    return train, heldout


def write(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write train.json and heldout.json into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.json", folder / "heldout.json"
    for path, rows in zip(paths, questions(seed), strict=True):
        text = ",\n".join(json.dumps(question.row(), ensure_ascii=False) for question in rows)
        path.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    return paths
