"""Our tokens and loss masks as a data set that Megatron-Bridge's loader reads by number: the core engine's batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Optional

import numpy as np
import torch

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.config.validate import sequence_multiple
from primus_bridge.data.batches import Batch, BatchShape, evaluation_microbatches, microbatches
from primus_bridge.data.loader import WholeLoader
from primus_bridge.data.store import TokenizedDataset
from primus_bridge.errors import ConfigError

ENDLESS = 2**62
"""Length of a data set whose epochs follow one another: their sampler counts on to it, the run ends before."""


@dataclass(frozen=True)
class Cut:
    """How their loader deals a global batch: micro-batch k of rank r is rows (k * ranks + r) * micro_batch_size on."""

    micro_batch_size: int
    global_batch_size: int
    data_parallel: int
    seq_length: int
    pad_id: int
    pad_to: str
    multiple_of: int

    @property
    def per_rank(self) -> int:
        """Micro-batches of a step on one rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    def shape(self, rank: int) -> BatchShape:
        return BatchShape(
            micro_batch_size=self.micro_batch_size,
            dp_rank=rank,
            dp_size=self.data_parallel,
            pad_id=self.pad_id,
            seq_length=self.seq_length,
            pad_to=self.pad_to,
            multiple_of=self.multiple_of,
        )


def cut_of(arguments: BridgeArguments, world_size: int, pad_id: int) -> Cut:
    """For a job of this many ranks."""
    model, train = arguments.model, arguments.train
    stages = model.pipeline_model_parallel_size
    return Cut(
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        data_parallel=world_size // (model.tensor_model_parallel_size * stages * model.context_parallel_size),
        seq_length=model.seq_length,
        pad_id=pad_id,
        # its pipeline sends activations of seq_length, whatever the batch has
        pad_to="seq_length" if stages > 1 else arguments.dataset.pad_to,
        multiple_of=sequence_multiple(model),
    )


class _Rows(torch.utils.data.Dataset, ABC):
    """Row i of all steps: step i // global_batch_size, dealt as Cut says."""

    def __init__(self, data: TokenizedDataset, cut: Cut):
        self.data, self.cut = data, cut
        self._made: tuple[tuple[int, int], list[Batch]] = ((-1, -1), [])

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        cut = self.cut
        step, place = divmod(index, cut.global_batch_size)
        number, within = divmod(place, cut.micro_batch_size * cut.data_parallel)
        rank, row = divmod(within, cut.micro_batch_size)
        if self._made[0] != (step, rank):
            self._made = ((step, rank), self.batches(step, rank))
        return _row(self._made[1][number], row)

    @abstractmethod
    def batches(self, step: int, rank: int) -> list[Batch]:
        """The micro-batches of a rank in a step."""


class TrainingRows(_Rows):
    """The order of the core engine's loader: epoch after epoch without a gap, each shuffled by seed."""

    def __init__(self, data: TokenizedDataset, cut: Cut, seed: int, shuffle: bool):
        super().__init__(data, cut)
        self.loader = WholeLoader(data, seed, shuffle)

    def batches(self, step: int, rank: int) -> list[Batch]:
        self.loader.load({"epoch": 0, "sample": step * self.cut.global_batch_size})
        return microbatches(self.loader.next(self.cut.global_batch_size), self.cut.shape(rank))


class ValidationRows(_Rows):
    """Every sequence once an evaluation (the first ``limit`` of them), then again; the last step is filled up."""

    def __init__(self, data: TokenizedDataset, cut: Cut, eval_iters: Optional[int]):
        super().__init__(data, cut)
        self.limit = None if eval_iters is None else eval_iters * cut.global_batch_size
        sequences = data.num_sequences if self.limit is None else min(self.limit, data.num_sequences)
        self.steps = -(-sequences // cut.global_batch_size)
        self._position = (-1, 0)
        self._rest: Iterator[list[Batch]] = iter(())

    def batches(self, step: int, rank: int) -> list[Batch]:
        step %= self.steps
        if self._position[0] != rank or self._position[1] > step:
            self._position = (rank, 0)
            self._rest = evaluation_microbatches(
                self.data, self.cut.shape(rank), max_sequences=self.limit, num_microbatches=self.cut.per_rank
            )
        skipped = step - self._position[1]
        self._position = (rank, step + 1)
        return next(islice(self._rest, skipped, None))


def _row(batch: Batch, row: int) -> dict[str, torch.Tensor]:
    """One row of a micro-batch; of a packed one, which is one row, also where its documents end."""
    out = {name: batch[name][row] for name in ("tokens", "labels", "loss_mask", "position_ids")}
    if "cu_seqlens" in batch:
        ends = batch["cu_seqlens"]
        length = batch["tokens"].shape[1]
        if ends[-1] < length:  # the padding is a document too: its kernels want every position in one
            ends = torch.cat([ends, ends.new_tensor([length])])
        out["cu_seqlens"] = ends
        out["cu_seqlens_argmin"] = torch.tensor(len(ends))
        out["max_seqlen"] = ends.diff().max()
    return out


def check_whole_weights(data: TokenizedDataset, what: str) -> None:
    """Raises ConfigError when a token counts in part: their loss counts whole tokens."""
    weights = np.unique(data.loss_weights)
    if not np.isin(weights, (0, 1)).all():
        raise ConfigError(
            f"the {what} data has tokens of weight {weights[(weights != 0) & (weights != 1)][0]:g}, and engine bridge "
            "counts whole tokens in its loss: leave the weights out, or run engine: core"
        )


@dataclass(frozen=True)
class Samples:
    """What the run trains on and evaluates on, before it is cut for a layout."""

    train: TokenizedDataset
    validation: Optional[TokenizedDataset]

    def rows(self, cut: Cut, arguments: BridgeArguments) -> tuple[TrainingRows, Optional[ValidationRows]]:
        train = TrainingRows(self.train, cut, arguments.rng.seed, arguments.dataset.shuffle)
        if self.validation is None:
            return train, None
        return train, ValidationRows(self.validation, cut, arguments.train.eval_iters)
