"""The end of the model: final norm, output layer and loss, as megatron/cross_entropy.py computes them in chunks."""

from __future__ import annotations

from dataclasses import dataclass

from primus_bridge.plan.layer import norm_scratch
from primus_bridge.plan.linear import weight_gradient
from primus_bridge.plan.operations import FP32, MicroBatch

# megatron/cross_entropy.py's; that room imports torch
KEEP_BYTES = 256 * 2**20
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Output:
    """Bytes of the last stage at the end of a micro-batch.

    kept: from the forward to the backward pass. forward, backward: the most that exists beside the layers' kept
    tensors in either; after: the output layer's gradient, which stays until the embedding's is added where the two
    are one parameter.
    """

    kept: float
    forward: float
    backward: float
    after: float


def output(batch: MicroBatch, padded_vocab_size: int, tied_here: bool) -> Output:
    """tied_here: this stage has the embedding as well, and it is the output layer."""
    arch, element = batch.arch, batch.element
    hidden, rows = arch.hidden_size, padded_vocab_size // batch.layout.tensor
    # every position may be supervised; prompts and padding, which are not, are left out of what follows
    count = batch.positions
    selected = count * hidden * element
    stream = 2 * batch.stream + batch.stream_positions * FP32  # the final norm's input and output
    gathered = batch.positions * hidden * element if batch.layout.sequence_parallel else 0
    keeps_gradients = count * rows * element <= KEEP_BYTES
    gradients = count * rows * element if keeps_gradients else 0
    chunk = min(max(64, CHUNK_BYTES // (FP32 * rows)), count)
    chunks = -(-count // chunk)
    # logits and their log-softmax; a soft cap and its slope take two more
    one = chunk * rows * FP32 * (2 + (2 if arch.logit_softcap else 0) + (1 if arch.logits_divisor != 1.0 else 0))
    kept = stream + selected + gradients
    forward = stream + gathered + selected + gradients * (chunks - 1) / chunks + one
    weights = _weight_gradients(batch, rows * hidden, chunks) if batch.full else 0
    backward = kept + 2 * selected + weights + (0 if keeps_gradients else one)
    # the selected positions go back to their places, and through the norm
    numbers = batch.stream_positions * hidden
    through_norm = (
        stream + selected + batch.positions * hidden * element + norm_scratch(arch.norm == "rms", numbers, element)
    )
    after = rows * hidden * element if batch.full and tied_here else 0
    return Output(kept, forward, max(backward, through_norm + after), after)


def _weight_gradients(batch: MicroBatch, numbers: int, chunks: int) -> int:
    """One chunk writes the gradient in place; several add their products in fp32, which is cast in the end."""
    if chunks == 1:
        return weight_gradient(batch, numbers)
    # the sum; a product, which a CPU first converts to fp32; in the end the sum in the weight's dtype
    product = batch.element + (FP32 if batch.cpu and batch.element != FP32 else 0)
    return numbers * (FP32 + product)
