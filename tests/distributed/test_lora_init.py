"""How an adapter's first matrix starts: uniform as PEFT's, or normal as Megatron-Bridge's recipes have it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tests.distributed.harness import run_distributed

RANK, SIZE = 64, 512


def started(method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix; and the second of two ranks' half of its columns."""
    from primus_bridge.peft.build import _initialise

    whole, half = torch.nn.Parameter(torch.empty(RANK, SIZE)), torch.nn.Parameter(torch.empty(RANK, SIZE // 2))
    half.tensor_model_parallel = True  # type: ignore[attr-defined]
    second = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    _initialise(whole, "5678:name", second, method)
    _initialise(half, "5678:name", second, method)
    return whole.data, half.data


@pytest.mark.parametrize(
    "method, std", [("kaiming", 1 / math.sqrt(3 * SIZE)), ("xavier", math.sqrt(2 / (RANK + SIZE)))]
)
def test_start(method, std):
    whole, half = run_distributed(started, 1, method)[0]
    assert whole.std().item() == pytest.approx(std, rel=0.02)
    assert (whole.abs().max() > 2 * std) == (method == "xavier")  # a normal has tails
    assert torch.equal(half, whole[:, SIZE // 2 :])
