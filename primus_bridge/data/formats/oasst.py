"""OpenAssistant's message trees, flat (a row a message) or nested (a row a tree), cut into conversations.

Flat: message_id, parent_id, text, role; optional lang, rank, deleted, review_result. Nested: column prompt, a message
with text, role and replies, each of which is a message again. Source: huggingface.co/datasets/OpenAssistant/oasst1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from primus_bridge.data.formats.base import Format, renamed
from primus_bridge.data.formats.fields import column, rows_of, text
from primus_bridge.data.formats.turns import ROLES
from primus_bridge.data.messages import Conversation, Message, RowError, Unusable
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from primus_bridge.data.sources import Row


@dataclass
class Choice:
    """Which messages and paths of a tree are used (DatasetArguments.oasst_paths, languages, include_unreviewed).

    Left out, with all below them: deleted messages; those of other languages than ``languages``; those not approved
    (review_result false or null), unless asked for or the data has no such column; and empty answers.
    """

    paths: str = "best"
    """best: from the prompt on the reply of the lowest rank each time (ranked ones before unranked, else in the data's
    order), up to the last answer. all: one conversation for every answer that no further answer follows."""
    languages: Sequence[str] = ()
    include_unreviewed: bool = False

    def __call__(self, data: dict[str, Any]) -> list[Conversation]:
        """The conversations of one nested tree."""
        if "prompt" not in data and "message_id" in data:
            raise RowError(
                "parent_id",
                f"message '{data.get('parent_id')}' is not in the data, or leads back to no prompt; add it, or leave "
                "such rows out with dataset.bad_rows: drop",
            )
        root = _Node.of(column(data, "prompt"), "prompt", self)
        if root is None:
            raise Unusable("filtered")
        if root.message.role != "user":
            raise RowError("prompt.role", "is not the prompter's; a tree begins with a prompter's message")
        paths = [root.best_path()] if self.paths == "best" else list(root.all_paths())
        conversations = [Conversation([node.message for node in path]) for path in paths if len(path) > 1]
        if not conversations:
            raise Unusable("filtered")
        return conversations

    def keeps(self, message: dict[str, Any]) -> bool:
        reviewed = "review_result" not in message or _is_true(message["review_result"]) or self.include_unreviewed
        spoken = not self.languages or message.get("lang") in self.languages
        return reviewed and spoken and not _is_true(message.get("deleted"))


class _Node:
    """A message that is used, with the replies that are used, best rank first; answers: in it and below it."""

    def __init__(self, message: Message, rank: float, replies: list[_Node]):
        self.message, self.rank = message, rank
        self.replies = sorted(replies, key=lambda reply: reply.rank)  # stable: the data's order among equals
        self.answers: int = (message.role == "assistant") + sum(reply.answers for reply in replies)

    @classmethod
    def of(cls, value: Any, place: str, choice: Choice) -> _Node | None:
        if not isinstance(value, dict):
            raise RowError(place, f"expected a message with text and role, found {type(value).__name__}")
        if not choice.keeps(value):
            return None
        role = text(column(value, "role"), f"{place}.role")
        if ROLES.get(role) not in ("user", "assistant"):
            raise RowError(f"{place}.role", f"unknown role '{role}'; known are prompter and assistant")
        said = text(column(value, "text"), f"{place}.text")
        if ROLES[role] == "assistant" and not said.strip():
            return None
        found = rows_of(value.get("replies") or [], f"{place}.replies", "messages")
        replies = [cls.of(reply, f"{place}.replies[{i}]", choice) for i, reply in enumerate(found)]
        rank = _rank(value.get("rank"), f"{place}.rank")
        return cls(Message(ROLES[role], said), rank, [reply for reply in replies if reply is not None])

    def best_path(self) -> list[_Node]:
        path = [self]
        while path[-1].replies:
            path.append(path[-1].replies[0])
        while path and path[-1].message.role != "assistant":
            path.pop()
        return path

    def all_paths(self) -> Iterator[list[_Node]]:
        if self.message.role == "assistant" and self.answers == 1:
            yield [self]
        for reply in self.replies:
            for path in reply.all_paths():
                yield [self, *path]


def _is_true(value: Any) -> bool:
    return str(value).lower() == "true"  # in CSV it is text


def _rank(value: Any, place: str) -> float:
    """0 is the best; of null, and of an empty cell in CSV, infinity."""
    if value is None or value == "":
        return math.inf
    try:
        rank = float(value)
    except (TypeError, ValueError):
        raise RowError(place, f"expected a number or null, found {value!r:.40}") from None
    return math.inf if math.isnan(rank) else rank


class OASST(Format):
    """Message rows, in any order, are assembled to trees: all of them are held, and no tree comes before the last."""

    def __init__(self, choice: Choice, columns: dict[str, str]):
        super().__init__("oasst", choice)
        self.names = columns

    def gather(self, rows: Iterable[Row]) -> Iterable[Row]:
        """A row a tree, at the place of its prompt, in the prompts' order; rows of nested trees as they are.

        A message whose prompt is not among the rows becomes a row of its own, which ``conversations`` refuses.
        Raises ConfigError for a message that comes twice, or without its columns.
        """
        messages: dict[str, Row] = {}
        for row in rows:
            try:
                data = renamed(row.data, self.names)
                if "prompt" in data:
                    yield row._replace(data=data)
                    continue
                name = text(column(data, "message_id"), "message_id")
                column(data, "parent_id")
            except RowError as error:
                raise error.at(row) from None
            if name in messages:
                raise ConfigError(
                    f"row {row.number}: message '{name}' comes twice, first at {messages[name].where}; remove one",
                    where=row.where,
                )
            messages[name] = row._replace(data=data)
        yield from _trees(messages)


def _trees(messages: dict[str, Row]) -> Iterator[Row]:
    replies: dict[str, list[str]] = {}
    for name, row in messages.items():
        replies.setdefault(row.data["parent_id"] or "", []).append(name)
    reached: set[str] = set()

    def nested(name: str) -> dict[str, Any]:
        reached.add(name)
        return messages[name].data | {"replies": [nested(reply) for reply in replies.get(name, ())]}

    trees = {name: nested(name) for name in replies.get("", ())}
    for name, row in messages.items():
        if name in trees:
            yield row._replace(data={"message_tree_id": row.data.get("message_tree_id"), "prompt": trees[name]})
        elif name not in reached:
            yield row
