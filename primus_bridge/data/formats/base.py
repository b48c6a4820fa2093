"""What a format is: rows in, conversations out, with the columns renamed as the user asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from primus_bridge.data.formats.fields import column
from primus_bridge.data.formats.instruction import document
from primus_bridge.data.formats.preference import Preference, pairs
from primus_bridge.data.messages import Conversation

if TYPE_CHECKING:
    from primus_bridge.data.sources import Row


def renamed(data: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under the format's names. ``columns``: the format's name -> the data's, which must be there."""
    if not columns:
        return data
    taken = set(columns.values())
    kept = {name: value for name, value in data.items() if name not in taken}
    return kept | {
        ours: column(data, theirs, f"dataset.columns reads '{ours}' from it; ") for ours, theirs in columns.items()
    }


class Format:
    """A format with its options. Pickled to the processes that tokenise."""

    def __init__(
        self,
        name: str,
        convert: Callable[[dict[str, Any]], Conversation | list[Conversation]],
        columns: dict[str, str] | None = None,
    ):
        self.name, self.convert, self.columns = name, convert, columns or {}

    def gather(self, rows: Iterable[Row]) -> Iterable[Row]:
        """The rows that ``conversations`` takes; most formats' are those of the file."""
        return rows

    def conversations(self, data: dict[str, Any]) -> list[Conversation]:
        """What the row holds, usually one. Raises RowError; or Unusable for a sound row that gives no sample."""
        found = self.convert(renamed(data, self.columns))
        return found if isinstance(found, list) else [found]

    def pair(self, data: dict[str, Any]) -> Preference:
        """The preference pair of the row, for DPO. Raises RowError and Unusable."""
        return pairs(renamed(data, self.columns))

    def document(self, data: dict[str, Any]) -> str:
        """The plain text of the row, for pretraining. Raises RowError."""
        return document(renamed(data, self.columns))

    def fingerprint(self) -> str:
        """What the conversations depend on beside the rows and ``DatasetArguments``: nothing, for most."""
        return ""
