"""The attention core against plain attention with a whole mask: windows and soft caps, in one block and in several."""

from __future__ import annotations

from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch

from primus_bridge.conversion.architecture import Architecture
from tests.distributed.harness import run_distributed

S, HEADS, GROUPS, D = 300, 4, 2, 8


def attend(window: int | None, softcap: float | None, block: int, value_size: int = D):
    """(output, gradients of query, key, value) of the core."""
    from primus_bridge.megatron import core_attention

    core_attention.QUERY_BLOCK = block
    arch = Architecture("x", 1, 32, 32, HEADS, GROUPS, D, 10, 1e-6, S, windows=(window,), attention_softcap=softcap)
    core = core_attention.SDPACoreAttention(SimpleNamespace(attention_dropout=0.0), 1, arch)
    inputs = _inputs(value_size)
    out = core(*inputs)
    out.square().sum().backward()
    return out.detach(), [t.grad for t in inputs]


def _inputs(value_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, D), (GROUPS, D), (GROUPS, value_size))
    return [torch.randn(S, 2, *size, generator=generator).requires_grad_() for size in sizes]


def plain(window: int | None, softcap: float | None, value_size: int = D):
    inputs = _inputs(value_size)
    q, k, v = (t.permute(1, 2, 0, 3) for t in inputs)
    k, v = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / D**0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(S)[:, None] - torch.arange(S)
    seen = (distance >= 0) & (distance < (window or S))
    out = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).permute(2, 0, 1, 3).reshape(S, 2, -1)
    out.square().sum().backward()
    return out.detach(), [t.grad for t in inputs]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 7, 150, 299, 300])
def test_windows_and_soft_caps(window, softcap):
    out, gradients = run_distributed(attend, 1, window, softcap, 64)[0]
    want, want_gradients = plain(window, softcap)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    for gradient, expected in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def cos_sin_lengths():
    from primus_bridge.conversion.architecture import Rope
    from primus_bridge.megatron.rotary import RotaryEmbedding

    scaling = dict(short_factor=[1.0] * 4, long_factor=[3.0] * 4, original_max_position_embeddings=32)
    ropes = [
        Rope(1e4, 8, 64, {"rope_type": "longrope", **scaling}),
        Rope(1e4, 8, 64, {"rope_type": "dynamic", "factor": 4}),
    ]
    embedding = RotaryEmbedding(ropes, seq_length=100)
    ten, hundred = torch.arange(10)[None], torch.arange(100)[None]
    return embedding(ten, 10), embedding(hundred, 100)[:, :10], RotaryEmbedding(ropes, seq_length=20)(ten, 10)


def test_a_samples_positions_do_not_depend_on_its_neighbours():
    """longrope and dynamic stretch by the run's longest sequence, not by the longest of the batch."""
    short, long, other_run = run_distributed(cos_sin_lengths, 1)[0]
    assert torch.equal(short, long)
    assert (short - other_run).abs().max() > 0.1


def test_values_smaller_than_keys():
    out, gradients = run_distributed(attend, 1, None, None, 64, 5)[0]
    want, want_gradients = plain(None, None, 5)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients[2], want_gradients[2], rtol=1e-4, atol=1e-5)


def documents_in_bf16(lengths: list[int]):
    """(output, gradients) of packed documents in bf16, some computed in fp32; and in fp32 throughout."""
    from primus_bridge.megatron.core_attention import SDPACoreAttention
    from primus_bridge.megatron.documents import Documents, Span

    arch = Architecture("x", 1, 32, 32, HEADS, GROUPS, D, 10, 1e-6, S)
    core = SDPACoreAttention(SimpleNamespace(attention_dropout=0.0), 1, arch)
    starts = [0, *accumulate(lengths)]
    documents = Documents(tuple(Span(0, start, stop) for start, stop in pairwise(starts)), True)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(starts[-1] + 9, 1, n, D, generator=generator).bfloat16() for n in (HEADS, GROUPS, GROUPS)]
        inputs = [t.to(dtype).requires_grad_() for t in inputs]
        out = core(*inputs, documents=documents)
        out.float().square().sum().backward()
        assert out.dtype == dtype
        results.append([out.detach().float(), *(t.grad.float() for t in inputs)])
    return results


def test_short_and_long_documents_in_bf16():
    for half, whole in zip(*run_distributed(documents_in_bf16, 1, [5, 300, 1, 255, 256, 257])[0], strict=True):
        torch.testing.assert_close(half, whole, rtol=3e-2, atol=3e-2)


def lower_right(queries: int, keys: int):
    """Attention of the last queries: with our mask, and with torch's that a GPU is given."""
    from torch.nn.attention.bias import causal_lower_right

    from primus_bridge.megatron.core_attention import lower_right_mask

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, D, generator=generator) for n in (queries, keys, keys))
    masks = (lower_right_mask(queries, keys, None, q), causal_lower_right(queries, keys))
    return [torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask) for mask in masks]


def test_torchs_lower_right_mask_is_ours():
    ours, theirs = run_distributed(lower_right, 1, 5, 12)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
