"""Random states of a rank: seeded by one rule, saved and restored whole."""

from __future__ import annotations

import hashlib
import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed


def seed_ranks(seed: int) -> None:
    """Seed Python, torch, the device and Megatron's tracker.

    Tensor-parallel ranks share a seed (they draw the same numbers for what they share, and others inside the tracker's
    fork); pipeline stages, data-parallel and context-parallel ranks differ, as in Megatron-LM: the first ten of them
    from those of other stages too.
    """
    data = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank() + 10 * data
    get_cuda_rng_tracker().reset()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)


def own_numbers(config) -> AbstractContextManager:
    """In a layer: where each tensor-parallel rank draws numbers of its own, for what it has its own part of.

    Under sequence parallelism Megatron's TransformerBlock has its layers in the tracker's fork already. A second fork
    inside would begin with the numbers of the first again, and leave others to what follows it when the layer is
    recomputed, where the first is not.
    """
    return nullcontext() if config.sequence_parallel else get_cuda_rng_tracker().fork()


def rng_state() -> dict[str, Any]:
    """This rank's states, of plain types and tensors only."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": [version, list(numbers), gauss],
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


class RankRNG:
    """The random states of this rank as a state component; at another layout seeded anew by (seed, step)."""

    def __init__(self, seed: int):
        self.seed = seed

    def state_dict(self) -> dict[str, Any]:
        return rng_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_rng_state(state)

    def layout_changed(self, step: int) -> None:
        # not their sum: ranks differ by small numbers too, and would repeat each other's
        seed_ranks(int.from_bytes(hashlib.sha256(f"{self.seed} {step}".encode()).digest()[:7], "big"))
