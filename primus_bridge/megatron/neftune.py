"""NEFTune: uniform noise on the embeddings of a document, the same however the batch is cut and laid out.

Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning".
"""

from __future__ import annotations

import math

import torch

from primus_bridge.megatron.documents import Documents


def document_noise(seed: int, tokens: int, hidden_size: int, alpha: float) -> torch.Tensor:
    """Uniform in +-alpha / sqrt(tokens x hidden_size), fp32 [tokens, hidden_size], on the CPU and from the seed alone.

    ``tokens`` are the document's own; transformers and TRL take the length of the padded batch, by which the noise of
    a sample would depend on its neighbours.
    """
    generator = torch.Generator().manual_seed(seed)
    size = alpha / math.sqrt(tokens * hidden_size)
    return torch.empty(tokens, hidden_size).uniform_(-size, size, generator=generator)


def batch_noise(documents: Documents, rows: int, length: int, hidden_size: int, alpha: float) -> torch.Tensor:
    """Noise of a micro-batch, fp32 [length, rows, hidden_size] on the CPU: zero on padding."""
    assert len(documents.noise_seeds) == len(documents.spans)
    noise = torch.zeros(length, rows, hidden_size)
    for span, seed in zip(documents.spans, documents.noise_seeds, strict=True):
        if span.start < span.stop:
            noise[span.start : span.stop, span.row] = document_noise(seed, span.stop - span.start, hidden_size, alpha)
    return noise
