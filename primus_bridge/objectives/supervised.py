"""Next-token loss on the supervised tokens: the objective of SFT and of pretraining."""

from __future__ import annotations

import torch


def supervised(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(sum of -log p over supervised tokens, their count, metrics).

    log_probs: log p(label), fp32 [b, s]. batch["loss_mask"]: weight of each label [b, s].
    The sum and the count are reduced over micro-batches and ranks before they are divided: never a mean of means.
    Returns metrics as (sum, count) pairs, detached.
    """
    mask = batch["loss_mask"]
    loss = -(log_probs * mask).sum()
    count = mask.sum()
    return loss, count, {"loss": torch.stack((loss.detach(), count.detach()))}
