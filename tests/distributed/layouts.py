"""Arguments and synthetic batches of the layout tests: the same for every layout."""

from __future__ import annotations

from itertools import accumulate

import torch

from primus_bridge.config.arguments import BridgeArguments


def arguments_for(model: dict | None = None, **sections: dict) -> BridgeArguments:
    """BridgeArguments with the given fields set: ``arguments_for({"tensor_model_parallel_size": 2}, train={...})``."""
    arguments = BridgeArguments()
    for section, fields in {"model": model or {}, **sections}.items():
        if not isinstance(fields, dict):
            setattr(arguments, section, fields)
            continue
        for name, value in fields.items():
            assert hasattr(getattr(arguments, section), name), (section, name)
            setattr(getattr(arguments, section), name, value)
    return arguments


def synthetic_rows(vocab_size: int, rows: int, longest: int = 24, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Rows of uneven length: (ids, loss weights), the first part of each a masked prompt."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(rows):
        length = int(torch.randint(8, longest + 1, (), generator=generator))
        prompt = int(torch.randint(2, length - 2, (), generator=generator))
        ids = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        result.append((ids, [0] * prompt + [1] * (length - prompt)))
    return result


def pad_batch(rows: list[tuple[list[int], list[int]]], length: int) -> dict[str, torch.Tensor]:
    """tokens, labels, loss_mask, position_ids of [rows, length], right padded."""
    batch = {
        "tokens": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.zeros(len(rows), length, dtype=torch.long),
        "loss_mask": torch.zeros(len(rows), length),
        "position_ids": torch.arange(length)[None].repeat(len(rows), 1),
    }
    for index, (ids, weights) in enumerate(rows):
        n = len(ids) - 1
        batch["tokens"][index, :n] = torch.tensor(ids[:-1])
        batch["labels"][index, :n] = torch.tensor(ids[1:])
        batch["loss_mask"][index, :n] = torch.tensor(weights[1:], dtype=torch.float)
    return batch


def pack_batch(rows: list[tuple[list[int], list[int]]], length: int) -> dict[str, torch.Tensor]:
    """The same rows one after the other in a row of ``length``: tokens, labels, loss_mask, position_ids, cu_seqlens."""
    cu_seqlens = [0, *accumulate(len(ids) - 1 for ids, _ in rows)]
    batch = pad_batch([], length)
    for name, tensor in batch.items():
        batch[name] = torch.zeros(1, length, dtype=tensor.dtype)
    for (ids, weights), start in zip(rows, cu_seqlens, strict=False):
        alone = pad_batch([(ids, weights)], len(ids) - 1)
        for name, tensor in alone.items():
            batch[name][:, start : start + len(ids) - 1] = tensor
    return batch | {"cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32)}


def add_noise_seeds(batch: dict[str, torch.Tensor], rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """What NEFTune needs beside: a seed a row (of its ids), and the rows' lengths."""
    seeds, lengths = [sum(ids) for ids, _ in rows], [len(ids) - 1 for ids, _ in rows]
    return batch | {"noise_seeds": torch.tensor(seeds), "lengths": torch.tensor(lengths)}


def make_batch(
    rows: list[tuple[list[int], list[int]]], longest: int, packed: bool, noise: bool = False
) -> dict[str, torch.Tensor]:
    """A micro-batch of the rows: each padded to ``longest``, or all packed into as many positions."""
    batch = pack_batch(rows, longest * len(rows)) if packed else pad_batch(rows, longest)
    return add_noise_seeds(batch, rows) if noise else batch
