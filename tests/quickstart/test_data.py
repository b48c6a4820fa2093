"""The quickstart's questions: right, the same for a seed, and never both trained and held out."""

from __future__ import annotations

import json
import re

import pytest

from primus_bridge.quickstart import data

METRES = {"km": 1_000_000, "m": 1000, "cm": 10, "mm": 1}
GRAMS = {"kg": 1000, "g": 1}


@pytest.fixture(scope="module")
def drawn():
    return data.questions(seed=7)


def numbers(question: data.Question) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", question.instruction)]


def convert(question: data.Question) -> str:
    """Through the smallest unit, by a table of its own."""
    number, source, target = re.search(r"(\d+) (\w+) (?:to|in) (\w+)", question.instruction).groups()
    scale = METRES if source in METRES else GRAMS
    converted = int(number) * scale[source] / scale[target]
    assert converted == int(converted)
    return f"{int(converted)} {target}"


ANSWERS = {
    "addition": lambda q: str(sum(numbers(q))),
    "subtraction": lambda q: str(numbers(q)[0] - numbers(q)[1]),
    "reversing": lambda q: "".join(reversed(q.input)),
    "sorting": lambda q: "".join(sorted(q.input)),
    "units": convert,
}


@pytest.mark.parametrize("skill", ANSWERS)
def test_answers_are_right(drawn, skill):
    for question in (*drawn[0], *drawn[1]):
        if question.skill == skill:
            assert question.output == ANSWERS[skill](question), question


def test_the_look_up_table_holds_one_value_an_item(drawn):
    table: dict = {}
    for question in (*drawn[0], *drawn[1]):
        if question.skill == "look-up":
            item, what, _ = question.key
            assert item in question.instruction and what in question.instruction
            assert question.output in data.TABLE[what]
            assert table.setdefault((item, what), question.output) == question.output
    assert len(set(table.values())) > 5


def test_looked_up_facts_were_trained_in_another_wording(drawn):
    known = {question.key[:2] for question in drawn[0] if question.skill == "look-up"}
    asked = [question for question in drawn[1] if question.skill == "look-up"]
    assert sum(question.key[:2] in known for question in asked) >= len(asked) - 1


def test_every_skill_is_trained_and_held_out(drawn):
    train, heldout = drawn
    for skill in data.SKILLS:
        assert sum(question.skill == skill for question in train) == data.TRAIN_ROWS[skill]
        assert sum(question.skill == skill for question in heldout) == data.HELDOUT_ROWS
    assert 2000 <= len(train) <= 8000


def test_held_out_questions_are_not_trained(drawn):
    train, heldout = drawn
    assert not {(q.skill, q.key) for q in train} & {(q.skill, q.key) for q in heldout}
    texts = [(q.instruction, q.input) for q in (*train, *heldout)]
    assert len(set(texts)) == len(texts)


def test_the_seed_decides(tmp_path):
    first, again, other = (data.write(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for i in range(2):
        assert first[i].read_bytes() == again[i].read_bytes() != other[i].read_bytes()


def test_files_are_alpaca_rows(tmp_path):
    train, heldout = data.write(tmp_path, 1)
    for path, questions in zip((train, heldout), data.questions(1), strict=True):
        rows = json.loads(path.read_text(encoding="utf-8"))
        assert rows == [question.row() for question in questions]
        assert {"instruction", "input", "output"} <= set(rows[0])
