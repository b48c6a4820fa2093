"""OpenAssistant's message trees, flat (a row a message) or nested (a row a tree), cut into conversations.

Flat: message_id, parent_id, text, role; optional lang, rank, deleted, review_result. Nested: column prompt, a message
with text, role and replies, each of which is a message again. Source: huggingface.co/datasets/OpenAssistant/oasst1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
        """The conversations of one nested tree; the first one's skipped turns are the tree's messages left out."""
        if "prompt" not in data:
            _, parent = _names(data)
            raise RowError(
                "parent_id",
                f"message '{parent}' is not in the data, or leads back to no prompt; add it, or leave such rows out "
                "with dataset.bad_rows: drop",
            )
        root, left_out = self._used(data["prompt"])
        if root is None:
            raise Unusable("filtered")
        if root.message.role != "user":
            raise RowError("prompt.role", "is not the prompter's; a tree begins with a prompter's message")
        paths = [root.best_path()] if self.paths == "best" else list(root.all_paths())
        conversations = [Conversation([node.message for node in path]) for path in paths if len(path) > 1]
        if not conversations:
            raise Unusable("filtered")
        return [conversations[0]._replace(skipped_turns=left_out), *conversations[1:]]

    def _used(self, prompt: Any) -> tuple[_Node | None, int]:
        """(the prompt with the replies that are used, how many messages are left out)"""
        left_out, nodes = 0, []
        top: list[_Node] = []
        # of each message: where it stands, and the list it goes to; None below one that is left out
        pending: list[tuple[Any, str, list[_Node] | None]] = [(prompt, "prompt", top)]
        while pending:
            value, place, siblings = pending.pop()
            if not isinstance(value, dict):
                raise RowError(place, f"expected a message with text and role, found {type(value).__name__}")
            node = self._node(value, place) if siblings is not None else None
            if siblings is None or node is None:
                left_out += 1
            else:
                siblings.append(node)
                nodes.append(node)
            found = rows_of(value.get("replies") or [], f"{place}.replies", "messages")
            below = node.replies if node else None
            pending += [(reply, f"{place}.replies[{i}]", below) for i, reply in enumerate(found)][::-1]
        for node in reversed(nodes):  # replies before what they reply to
            node.replies.sort(key=lambda reply: reply.rank)  # stable: the data's order among equals
            node.answers = (node.message.role == "assistant") + sum(reply.answers for reply in node.replies)
        return (top[0] if top else None), left_out

    def _node(self, value: dict[str, Any], place: str) -> _Node | None:
        """The message without its replies; None when it is left out."""
        if not self.keeps(value):
            return None
        role = text(column(value, "role"), f"{place}.role")
        if ROLES.get(role) not in ("user", "assistant"):
            raise RowError(f"{place}.role", f"unknown role '{role}'; known are prompter and assistant")
        said = text(column(value, "text"), f"{place}.text")
        if ROLES[role] == "assistant" and not said.strip():
            return None
        return _Node(Message(ROLES[role], said), _rank(value.get("rank"), f"{place}.rank"))

    def keeps(self, message: dict[str, Any]) -> bool:
        reviewed = "review_result" not in message or _is_true(message["review_result"]) or self.include_unreviewed
        spoken = not self.languages or message.get("lang") in self.languages
        return reviewed and spoken and not _is_true(message.get("deleted"))


@dataclass
class _Node:
    """A message that is used, with the replies that are used, best rank first; answers: in it and below it."""

    message: Message
    rank: float
    replies: list[_Node] = field(default_factory=list)
    answers: int = 0

    def best_path(self) -> list[_Node]:
        path = [self]
        while path[-1].replies:
            path.append(path[-1].replies[0])
        while path and path[-1].message.role != "assistant":
            path.pop()
        return path

    def all_paths(self) -> Iterator[list[_Node]]:
        path: list[_Node] = []
        pending = [(self, 0)]
        while pending:
            node, depth = pending.pop()
            path[depth:] = [node]
            if node.message.role == "assistant" and node.answers == 1:
                yield path[:]
            pending += [(reply, depth + 1) for reply in reversed(node.replies)]


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


def _names(data: dict[str, Any]) -> tuple[str, str]:
    """(message_id, parent_id or '') of a message row. Raises RowError when one is missing or no text."""
    name = text(column(data, "message_id"), "message_id")
    if not name:
        raise RowError("message_id", "is empty; give every message its own")
    return name, text(column(data, "parent_id"), "parent_id", optional=True)


class _Tree(dict[str, Any]):
    """The row of a tree made of message rows: ``messages``, under the format's names, the prompt first.

    Not nested yet: a long conversation is too deep to be pickled.
    """

    def nested(self) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        for message in self["messages"]:
            own = found[message["message_id"]] = message | {"replies": []}
            if message["parent_id"]:
                found[message["parent_id"]]["replies"].append(own)
        return {"prompt": next(iter(found.values()))}


class OASST(Format):
    """Message rows, in any order, are assembled to trees: all of them are held, and no tree comes before the last."""

    def __init__(self, choice: Choice, columns: dict[str, str]):
        super().__init__("oasst", choice, columns)
        self.choice = choice

    def conversations(self, data: dict[str, Any]) -> list[Conversation]:
        return self.choice(data.nested()) if isinstance(data, _Tree) else super().conversations(data)

    def gather(self, rows: Iterable[Row]) -> Iterable[Row]:
        """A row a tree, at the place of its prompt, in the prompts' order; rows of nested trees as they are.

        As they are, too, for ``conversations`` to refuse: messages whose prompt is not among the rows, and rows without
        the needed columns. Raises ConfigError for a message that comes twice.
        """
        messages: dict[str, tuple[Row, dict[str, Any]]] = {}
        replies: dict[str, list[str]] = {}
        for row in rows:
            try:
                data = renamed(row.data, self.columns)
                names = None if "prompt" in data else _names(data)
            except RowError:  # which ``conversations`` raises again
                names = None
            if names is None:
                yield row
                continue
            name, parent = names
            if name in messages:
                raise ConfigError(
                    f"row {row.number}: message '{name}' comes twice, first at {messages[name][0].where}; remove one",
                    where=row.where,
                )
            messages[name] = row, data
            replies.setdefault(parent, []).append(name)

        trees: dict[str, list[str]] = {}
        for prompt in replies.get("", ()):
            trees[prompt] = [prompt]
            for name in trees[prompt]:  # grows while it is read
                trees[prompt] += replies.get(name, ())
        reached = {name for tree in trees.values() for name in tree}
        for name, (row, data) in messages.items():
            if name in trees:
                tree = _Tree(message_tree_id=data.get("message_tree_id"))
                tree["messages"] = [messages[member][1] for member in trees[name]]
                yield row._replace(data=tree)
            elif name not in reached:
                yield row
