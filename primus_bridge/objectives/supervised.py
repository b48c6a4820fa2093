"""Next-token loss on the supervised tokens: the objective of SFT and of pretraining."""

from __future__ import annotations

import torch


def supervised(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(sum of weight x -log p, sum of the weights, metrics).

    log_probs: log p(label), fp32 [b, s]. batch["loss_mask"]: weight of each label [b, s], 1 or 0 by default.
    Both sums are reduced over micro-batches and ranks before they are divided: never a mean of means.
    Returns metrics as (sum, count) pairs, detached: loss, and supervised_tokens (labels of a weight above 0).
    """
    weights = batch["loss_mask"]
    loss, total = -(log_probs * weights).sum(), weights.sum()
    tokens = (weights > 0).sum().to(loss.dtype)
    metrics = {
        "loss": torch.stack((loss.detach(), total)),
        "supervised_tokens": torch.stack((tokens, torch.ones_like(tokens))),
    }
    return loss, total, metrics
