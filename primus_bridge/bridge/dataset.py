"""PrimusSamples: the dataset section of a ConfigContainer that gives the engine our rows (samples.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider
from torch.utils.data import Dataset


@dataclass
class PrimusSamples(DatasetProvider):
    """What the samples are made of is for the reader of a saved configuration; the rows are given by the run."""

    seq_length: int = 0
    samples: dict[str, Any] = field(default_factory=dict)
    """Our ``dataset`` section."""
    _rows: tuple[Optional[Dataset], Optional[Dataset]] = field(default=(None, None), init=False, repr=False)

    def give(self, train: Dataset, validation: Optional[Dataset]) -> None:
        self._rows = (train, validation)

    def build_datasets(
        self, context: DatasetBuildContext
    ) -> tuple[Optional[Dataset], Optional[Dataset], Optional[Dataset]]:
        """(train, validation, no test set)"""
        return *self._rows, None
