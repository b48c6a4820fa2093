"""Log-probabilities over a split vocabulary: values and gradients equal torch's, kept or projected again, in chunks."""

from __future__ import annotations

import pytest
import torch

from primus_bridge.megatron import cross_entropy
from tests.distributed.harness import run_distributed

SIZES = [(150, 300, 384), (0, 300, 384), (70, 90, 384)]  # rows, vocab, padded
MEMORY = [(2**30, 2**30), (2**30, 1), (0, 2**30), (0, 1), (0, 4 * 192 * 70)]  # keep_bytes, chunk_bytes


def _inputs(rows: int, vocab: int, padded: int):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    return hidden.float(), weight.float(), labels, upstream.float()


def splits() -> dict[tuple, tuple]:
    """``split`` of all SIZES with all MEMORY."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return {(*sizes, *memory): split(*sizes, *memory) for sizes in SIZES for memory in MEMORY}


def split(rows: int, vocab: int, padded: int, keep_bytes: int, chunk_bytes: int):
    """(values, summed gradient of hidden, gradient of this rank's rows) on this rank of the world."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    cross_entropy.KEEP_BYTES, cross_entropy.CHUNK_BYTES = keep_bytes, chunk_bytes
    hidden, weight, labels, upstream = _inputs(rows, vocab, padded)
    part = padded // size
    mine = weight[rank * part : (rank + 1) * part].clone().requires_grad_()
    hidden.requires_grad_()
    values = cross_entropy.label_log_probs(
        hidden,
        mine,
        labels,
        vocab_start=rank * part,
        vocab_rows=max(0, min(part, vocab - rank * part)),
        group=dist.group.WORLD if size > 1 else None,
    )
    values.backward(upstream)
    dist.all_reduce(hidden.grad)
    return values.detach(), hidden.grad, mine.grad


@pytest.fixture(scope="module")
def found():
    """What each rank found, by the number of ranks."""
    return {ranks: run_distributed(splits, ranks) for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("keep_bytes", "chunk_bytes"), MEMORY)
@pytest.mark.parametrize(("rows", "vocab", "padded"), SIZES)
def test_values_and_gradients(found, ranks, keep_bytes, chunk_bytes, rows, vocab, padded):
    hidden, weight, labels, upstream = _inputs(rows, vocab, padded)
    hidden.requires_grad_(), weight.requires_grad_()
    log_probs = torch.log_softmax(hidden @ weight[:vocab].t(), dim=-1)
    want = log_probs.gather(1, labels[:, None])[:, 0]
    want.backward(upstream)
    part = padded // ranks
    for rank, results in enumerate(found[ranks]):
        values, grad_hidden, grad_weight = results[rows, vocab, padded, keep_bytes, chunk_bytes]
        torch.testing.assert_close(values, want.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_hidden, hidden.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad_weight, weight.grad[rank * part : (rank + 1) * part], rtol=1e-4, atol=1e-5)
