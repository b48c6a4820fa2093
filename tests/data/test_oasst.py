"""OASST: message rows in any order become trees, and trees the paths that are asked for."""

from __future__ import annotations

import pickle
import random

import pytest

from primus_bridge.config.arguments import DatasetArguments
from primus_bridge.data.formats import Format, open_format
from primus_bridge.data.messages import RowError, Unusable
from primus_bridge.data.sources import Row, Source
from primus_bridge.errors import ConfigError


def message(name: str, parent: str | None, role: str, **more) -> dict:
    fields = {"lang": "en", "rank": None, "deleted": False, "review_result": True}
    return {"message_id": name, "parent_id": parent, "text": name, "role": role, **fields, **more}


# p1 - a1 (rank 1) - q1 - b1
#    |             \ q2
#    \ a0 (rank 0) - q3 (rank 0) - b2 (unranked)
#                  |             \ b3 (rank 2)
#                  \ q4 (rank 1)
# p2 - c1
FLAT = [
    message("p1", None, "prompter", message_tree_id="t1"),
    message("a1", "p1", "assistant", rank=1),
    message("a0", "p1", "assistant", rank=0),
    message("q1", "a1", "prompter"),
    message("q2", "a1", "prompter"),
    message("b1", "q1", "assistant"),
    message("q3", "a0", "prompter", rank=0),
    message("q4", "a0", "prompter", rank=1),
    message("b2", "q3", "assistant"),
    message("b3", "q3", "assistant", rank=2.0),
    message("p2", None, "prompter", message_tree_id="t2"),
    message("c1", "p2", "assistant", rank=0),
]
BEST = [["p1", "a0", "q3", "b3"], ["p2", "c1"]]
ALL = [["p1", "a0", "q3", "b3"], ["p1", "a0", "q3", "b2"], ["p1", "a1", "q1", "b1"], ["p2", "c1"]]


def opened(**options) -> Format:
    return pickle.loads(pickle.dumps(open_format("oasst", DatasetArguments(**options))))


def placed(rows) -> list[Row]:
    return [Row(row, number, f"rows.jsonl:{number}") for number, row in enumerate(rows, start=1)]


def paths(rows, **options) -> list[list[str]]:
    """The texts of every conversation; a tree that is filtered out whole gives none."""
    data_format, out = opened(**options), []
    for row in data_format.gather(placed(rows)):
        try:
            out += [[m.content for m in c.messages] for c in data_format.conversations(row.data)]
        except Unusable as error:
            assert error.reason == "filtered"
    return out


def nested(rows, name: str) -> dict:
    (own,) = [row for row in rows if row["message_id"] == name]
    return {**own, "replies": [nested(rows, row["message_id"]) for row in rows if row["parent_id"] == name]}


def changed(name: str, **fields) -> list[dict]:
    return [{**row, **fields} if row["message_id"] == name else row for row in FLAT]


def test_paths_of_message_rows():
    assert paths(FLAT) == BEST
    assert paths(FLAT, oasst_paths="all") == ALL
    roles = [m.role for m in opened().conversations(next(iter(opened().gather(placed(FLAT)))).data)[0].messages]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_rows_in_any_order_give_the_same_trees():
    for seed in range(5):
        rows = FLAT[:]
        random.Random(seed).shuffle(rows)
        assert sorted(paths(rows)) == sorted(BEST)
        assert sorted(paths(rows, oasst_paths="all")) == sorted(ALL)


def test_a_tree_lies_where_its_prompt_lies():
    gathered = list(opened().gather(placed([*FLAT[1:], FLAT[0]])))
    assert [(row.where, row.number, row.data["message_tree_id"]) for row in gathered] == [
        ("rows.jsonl:10", 10, "t2"),
        ("rows.jsonl:12", 12, "t1"),
    ]


def test_nested_trees_give_the_same_paths():
    trees = [{"message_tree_id": name, "prompt": nested(FLAT, name)} for name in ("p1", "p2")]
    assert paths(trees) == BEST
    assert paths(trees, oasst_paths="all") == ALL


def test_deleted_and_unreviewed_messages_and_what_is_below_are_left_out():
    assert paths(changed("a0", deleted=True)) == [["p1", "a1", "q1", "b1"], ["p2", "c1"]]
    assert paths(changed("a0", deleted=True), include_unreviewed=True)[0] == ["p1", "a1", "q1", "b1"]
    for unreviewed in (False, None):
        rows = changed("b3", review_result=unreviewed)
        assert paths(rows)[0] == ["p1", "a0", "q3", "b2"]
        assert paths(rows, include_unreviewed=True) == BEST
    without = [{key: value for key, value in row.items() if key != "review_result"} for row in FLAT]
    assert paths(without) == BEST
    assert paths(changed("p2", deleted=True), oasst_paths="all") == ALL[:-1]
    # nothing to answer with: the tree is counted as filtered out
    assert paths(changed("c1", deleted=True)) == BEST[:1]


def test_languages():
    rows = changed("q3", lang="de")
    assert paths(rows, languages=["en"]) == [["p1", "a0"], ["p2", "c1"]]
    assert paths(rows, languages=["en", "de"]) == BEST
    assert paths(rows, languages=["fr"]) == []
    assert paths(
        [{**row, "lang": "de"} if row["message_id"] in ("p2", "c1") else row for row in FLAT], languages=["de"]
    ) == [["p2", "c1"]]


def test_null_ranks_come_last_in_the_order_of_the_data():
    unranked = [{**row, "rank": None} for row in FLAT]
    assert paths(unranked) == [["p1", "a1", "q1", "b1"], ["p2", "c1"]]
    assert paths([{key: value for key, value in row.items() if key != "rank"} for row in FLAT]) == paths(unranked)


def test_an_empty_answer_is_left_out():
    assert paths(changed("b3", text=" \n"))[0] == ["p1", "a0", "q3", "b2"]


def test_csv_holds_the_flags_as_text(tmp_path):
    lines = [",".join(FLAT[1])]
    for row in changed("a0", deleted=True):
        lines.append(",".join("" if row.get(key) is None else str(row[key]) for key in FLAT[1]))
    (tmp_path / "oasst.csv").write_text("\n".join(lines) + "\n")
    rows = [row.data for row in Source(str(tmp_path / "oasst.csv"))]
    assert rows[2]["deleted"] == "True" and rows[0]["parent_id"] == ""
    assert paths(rows) == [["p1", "a1", "q1", "b1"], ["p2", "c1"]]


def test_a_message_without_its_prompt_is_refused():
    rows = [*FLAT, message("lost", "gone", "assistant"), message("x", "y", "prompter"), message("y", "x", "assistant")]
    gathered = list(opened().gather(placed(rows)))
    assert [row.where for row in gathered[2:]] == ["rows.jsonl:13", "rows.jsonl:14", "rows.jsonl:15"]
    for row, parent in zip(gathered[2:], ("gone", "y", "x"), strict=True):
        with pytest.raises(RowError, match=f"message '{parent}' is not in the data") as caught:
            opened().conversations(row.data)
        assert str(caught.value.at(row)).startswith(f"{row.where}: row {row.number}, column 'parent_id': ")


def test_a_wrong_message_is_named():
    with pytest.raises(ConfigError, match="rows.jsonl:13: row 13: message 'a1' comes twice, first at rows.jsonl:2"):
        list(opened().gather(placed([*FLAT, FLAT[1]])))
    for rows, column in (
        (changed("p1", role="assistant"), "prompt.role"),
        (changed("a1", role="wizard"), "prompt.replies[0].role"),
        (changed("a0", rank="first"), "prompt.replies[1].rank"),
        (changed("q1", text=None), "prompt.replies[0].replies[0].text"),
    ):
        with pytest.raises(RowError) as caught:
            paths(rows)
        assert caught.value.column == column


def test_a_malformed_row_is_left_to_conversations():
    wrong = [
        ("parent_id", {"message_id": "a"}),
        ("parent_id", message("a", 3, "assistant")),
        ("parent_id", message("a", ["p1"], "assistant")),
        ("message_id", message(7, "p1", "assistant")),
        ("message_id", message("", None, "prompter")),
        ("message_id", {"instruction": "x"}),
    ]
    gathered = list(opened().gather(placed([FLAT[0], *(row for _, row in wrong), *FLAT[1:]])))
    refused = [row for row in gathered if row.number in range(2, 8)]
    assert [row.data for row in refused] == [row for _, row in wrong]
    for row, (column, _) in zip(refused, wrong, strict=True):
        with pytest.raises(RowError) as caught:
            opened().conversations(row.data)
        assert caught.value.column == column
    trees = [row for row in gathered if row not in refused]
    assert [[m.content for m in opened().conversations(row.data)[0].messages] for row in trees] == BEST
    # under other names, a row without that column is named by it
    columns = {"message_id": "id"}
    (row,) = opened(columns=columns).gather(placed([FLAT[0]]))
    with pytest.raises(RowError, match="dataset.columns reads 'message_id' from it"):
        opened(columns=columns).conversations(row.data)


@pytest.mark.parametrize("shape", ["flat", "nested"])
def test_messages_left_out_are_counted(shape):
    def skipped(rows, **options) -> list[list[int]]:
        if shape == "nested":
            rows = [{"prompt": nested(rows, name)} for name in ("p1", "p2")]
        data_format = opened(**options)
        gathered = data_format.gather(placed(rows))
        return [[one.skipped_turns for one in data_format.conversations(row.data)] for row in gathered]

    assert skipped(FLAT) == [[0], [0]]
    assert skipped(changed("a0", deleted=True)) == [[5], [0]]  # with all below it
    assert skipped(changed("q2", review_result=False), oasst_paths="all") == [[1, 0, 0], [0]]
    assert skipped(changed("q2", review_result=False), include_unreviewed=True) == [[0], [0]]
    assert skipped(changed("q3", lang="de"), languages=["en"]) == [[3], [0]]
    assert skipped(changed("b3", text="")) == [[1], [0]]
    with pytest.raises(Unusable, match="filtered"):
        skipped(changed("c1", deleted=True))


@pytest.mark.parametrize("choice", ["best", "all"])
def test_a_long_chain(choice):
    roles = ("prompter", "assistant")
    names = [str(i) for i in range(3000)]
    rows = [message(name, str(i - 1) if i else None, roles[i % 2]) for i, name in enumerate(names)]
    (row,) = pickle.loads(pickle.dumps(list(opened().gather(placed(rows)))))
    (conversation,) = opened(oasst_paths=choice).conversations(row.data)
    assert [m.content for m in conversation.messages] == names
    tree = None
    for own in reversed(rows):
        tree = {**own, "replies": [tree] if tree else []}
    (conversation,) = opened(oasst_paths=choice).conversations({"prompt": tree})
    assert [m.content for m in conversation.messages] == names


def test_columns_are_renamed():
    rows = [{("id" if key == "message_id" else key): value for key, value in row.items()} for row in FLAT]
    assert paths(rows, columns={"message_id": "id"}) == BEST
    rows = [{("prompt" if key == "text" else key): value for key, value in row.items()} for row in FLAT]
    assert paths(rows, columns={"text": "prompt"}) == BEST
    trees = [{"tree": nested(FLAT, name), "prompt": 3} for name in ("p1", "p2")]
    assert paths(trees, columns={"prompt": "tree"}) == BEST
