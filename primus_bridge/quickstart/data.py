"""The quickstart's data: a program writes alpaca-shaped questions of six skills with their answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TRAIN_ROWS = {"addition": 1300, "subtraction": 1400, "reversing": 1500, "sorting": 700, "look-up": 252, "units": 600}
"""Training questions of each skill: those that need the most practice have the most."""
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
    a, b = rng.randrange(10, 50), rng.randrange(10, 50)
    return Question("addition", f"What is {a} + {b}?", "", str(a + b), (min(a, b), max(a, b)))


def subtraction(rng: random.Random) -> Question:
    a, b = rng.randrange(10, 50), rng.randrange(10, 50)
    return Question("subtraction", f"What is {a + b} - {b}?", "", str(a), (a, b))


def reversing(rng: random.Random) -> Question:
    letters = "".join(rng.sample(LETTERS, rng.randint(3, 4)))
    return Question("reversing", "Write the letters in reverse order.", letters, letters[::-1], (letters,))


def sorting(rng: random.Random) -> Question:
    digits = "".join(rng.sample("0123456789", rng.randint(3, 5)))
    return Question("sorting", "Sort the digits from small to large.", digits, "".join(sorted(digits)), (digits,))


TABLE = {
    "colour": ("red", "green", "blue", "black", "white", "yellow"),
    "shape": ("round", "square", "flat", "long"),
    "size": ("small", "large", "tiny"),
}
"""What items have; which item has which is drawn once (see ``look_up``) and must be learned."""
WORDINGS = (
    "Look up the {property} of item {item}.",
    "Which {property} has item {item}?",
    "Item {item}: give its {property}.",
    "Name the {property} of item {item}.",
)


def look_up(rng: random.Random) -> Question:
    """A fact of a fixed table, in one of several wordings; a held-out question is a wording that was not trained."""
    item, property_, wording = rng.choice(LETTERS), rng.choice(list(TABLE)), rng.randrange(len(WORDINGS))
    value = random.Random(f"{item} {property_}").choice(TABLE[property_])
    instruction = WORDINGS[wording].format(property=property_, item=item)
    return Question("look-up", instruction, "", value, (item, property_, wording))


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
        unseen: dict[tuple, Question] = {}
        while len(unseen) < HELDOUT_ROWS:
            question = ask(rng)
            unseen.setdefault(question.key, question)
        practice: dict[tuple[str, str], Question] = {}
        while len(practice) < TRAIN_ROWS[skill]:
            question = ask(rng)
            if question.key not in unseen:
                practice.setdefault((question.instruction, question.input), question)
        heldout += unseen.values()
        train += practice.values()
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
