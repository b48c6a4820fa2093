"""Seeded random token ids, the same on every rank: rows of uneven length, right padded, each with a masked prompt."""

from __future__ import annotations

from typing import Optional

import torch


def random_batch(
    vocab_size: int, rows: int, length: int, seed: int, pad_token: Optional[int] = None
) -> dict[str, torch.Tensor]:
    """tokens, labels, loss_mask, position_ids of [rows, length]; the first row fills the length.

    pad_token: what pads, and nothing else is: torch's embeddings give it no gradient (padding_idx).
    """
    generator = torch.Generator().manual_seed(seed)
    pad = (pad_token or 0) % vocab_size
    batch = {
        "tokens": torch.full((rows, length), pad),
        "labels": torch.full((rows, length), pad),
        "loss_mask": torch.zeros(rows, length),
        "position_ids": torch.arange(length)[None].repeat(rows, 1),
    }
    for row in range(rows):
        tokens = length if row == 0 else int(torch.randint(length // 2, length + 1, (), generator=generator))
        prompt = int(torch.randint(1, tokens // 2, (), generator=generator))
        # any token but the one that pads
        ids = (torch.randint(1, vocab_size, (tokens + 1,), generator=generator) + pad) % vocab_size
        batch["tokens"][row, :tokens] = ids[:-1]
        batch["labels"][row, :tokens] = ids[1:]
        batch["loss_mask"][row, prompt:tokens] = 1.0
    return batch
