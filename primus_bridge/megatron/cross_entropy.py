"""Log-probabilities of labels from hidden states: the output layer and softmax in one, over a split vocabulary.

Logits of a large vocabulary dominate the memory of fine-tuning, and most positions (prompts, padding) carry no loss.
Only the given rows are projected, in chunks; the padding columns of the vocabulary never enter the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist

# d log p / d logits up to this many bytes is kept for the backward pass; beyond it each chunk is projected again
KEEP_BYTES = 256 * 2**20
# fp32 logits of one chunk
CHUNK_BYTES = 128 * 2**20


def _chunks(n: int, padded_rows: int) -> list[slice]:
    # by the padded rows, which are as many on every rank: the ranks meet in a collective a chunk
    size = max(64, CHUNK_BYTES // (4 * padded_rows))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _local_log_softmax(hidden: torch.Tensor, used: torch.Tensor, local: torch.Tensor, form: Form):
    """(log-softmax over this rank's vocabulary, fp32 [n, v]; its value at ``local`` [n]; its logsumexp [n])."""
    logits = form(hidden @ used.t())
    if not logits.shape[1]:
        nothing = logits.new_zeros(logits.shape[:1])
        return logits, nothing, nothing - torch.inf
    log_softmax = torch.log_softmax(logits, dim=-1)
    at_label, logit = (values.gather(1, local[:, None])[:, 0] for values in (log_softmax, logits))
    return log_softmax, at_label, logit - at_label


def _unit_gradient(log_softmax, local_lse, lse, local, mine, dtype, form: Form) -> torch.Tensor:
    """d log p(label) / d projection; consumes log_softmax.

    Of the logits it is [is the label] - softmax over the whole vocabulary.
    """
    slope = form.slope(log_softmax + local_lse[:, None]) if form.softcap else None
    if local_lse is not lse:
        log_softmax += (local_lse - lse)[:, None]
    gradient = log_softmax.exp_().neg_()
    if gradient.shape[1]:
        gradient.scatter_add_(1, local[:, None], mine.to(gradient.dtype)[:, None])
    if slope is not None:
        gradient *= slope
    if form.divisor != 1.0:
        gradient /= form.divisor
    return gradient.to(dtype)


@dataclass(frozen=True)
class Form:
    """From the projection of a hidden state to its logits: divided by ``divisor``, then soft-capped."""

    divisor: float = 1.0
    softcap: Optional[float] = None

    def __call__(self, projected: torch.Tensor) -> torch.Tensor:
        logits = projected.float()
        if self.divisor != 1.0:
            logits = logits / self.divisor
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def slope(self, logits: torch.Tensor) -> torch.Tensor:
        """d logits / d (projection / divisor) of soft-capped logits."""
        assert self.softcap is not None
        return 1 - (logits / self.softcap).square()


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_start, vocab_rows, group, form):
        n = hidden.shape[0]
        used = weight[:vocab_rows]
        local = labels - vocab_start
        mine = (local >= 0) & (local < vocab_rows)
        local = local.clamp(0, max(vocab_rows - 1, 0))
        needed = any(ctx.needs_input_grad[:2])
        keep = needed and n * vocab_rows * hidden.element_size() <= KEEP_BYTES
        lse = torch.empty(n, dtype=torch.float32, device=hidden.device)
        picked = torch.empty_like(lse)
        kept = []
        for rows in _chunks(n, weight.shape[0]):
            log_softmax, at_label, local_lse = _local_log_softmax(hidden[rows], used, local[rows], form)
            lse[rows], picked[rows] = _over_ranks(local_lse, at_label, mine[rows], group)
            if keep:
                whole = local_lse if group is None else lse[rows]
                kept.append(_unit_gradient(log_softmax, local_lse, whole, local[rows], mine[rows], weight.dtype, form))
            del log_softmax  # before the next chunk's is made
        ctx.vocab_rows, ctx.group, ctx.form = vocab_rows, group, form
        ctx.save_for_backward(hidden, weight, local, mine, lse, *kept)
        return picked

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, local, mine, lse, *kept = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        form = ctx.form
        used = weight[: ctx.vocab_rows]
        chunks = _chunks(hidden.shape[0], weight.shape[0])
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        single = len(chunks) == 1
        grad_weight = torch.zeros_like(weight, dtype=weight.dtype if single else torch.float32) if want_weight else None
        for index, rows in enumerate(chunks):
            if kept:
                unit = kept[index]
            else:
                log_softmax, _, local_lse = _local_log_softmax(hidden[rows], used, local[rows], form)
                unit = _unit_gradient(log_softmax, local_lse, lse[rows], local[rows], mine[rows], weight.dtype, form)
                del log_softmax
            scale = grad[rows, None].to(weight.dtype)
            # a row's upstream gradient scales the small side of each product, not the vocabulary
            if want_hidden:
                torch.mm(unit, used, out=grad_hidden[rows])
                grad_hidden[rows] *= scale
            if want_weight and single:
                torch.mm(unit.t(), hidden * scale, out=grad_weight[: ctx.vocab_rows])
            elif want_weight:
                grad_weight[: ctx.vocab_rows] += unit.t() @ (hidden[rows] * scale)
        return grad_hidden, grad_weight.to(weight.dtype) if want_weight else None, *[None] * 5


def _over_ranks(local_lse, value, mine, group) -> tuple[torch.Tensor, torch.Tensor]:
    """(logsumexp over the whole vocabulary, log p of the label), from each rank's part."""
    if group is None:
        return local_lse, value
    # log(sum over ranks of exp(lse_r)): the maximum first, so that nothing overflows
    top = local_lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    logit = torch.where(mine, value + local_lse, torch.zeros_like(value))
    both = torch.stack((torch.exp(local_lse - top), logit))
    dist.all_reduce(both, group=group)
    lse = both[0].log() + top
    return lse, both[1] - lse


def label_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_start: int,
    vocab_rows: int,
    group=None,
    divisor: float = 1.0,
    softcap: Optional[float] = None,
) -> torch.Tensor:
    """log p(label) of each row, fp32 [n].

    hidden [n, h], equal on the tensor-parallel ranks of ``group``; weight [v, h]: this rank's rows of the output
    layer, of which the first ``vocab_rows`` are real (the rest is padding) and stand for the vocabulary from
    ``vocab_start``. Logits are hidden @ weight^T / divisor, soft-capped. labels [n] int64. The gradient of ``hidden``
    is this rank's part: its sum over the group is whole.
    """
    return _LabelLogProbs.apply(hidden, weight, labels, vocab_start, vocab_rows, group, Form(divisor, softcap))
