"""Log-probabilities of labels from hidden states: the output layer and softmax in one, over a split vocabulary.

Logits of a large vocabulary dominate the memory of fine-tuning, and most positions (prompts, padding) carry no loss.
Only the given rows are projected, in chunks; the padding columns of the vocabulary never enter the softmax.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

# logits up to this many bytes are kept for the backward pass; beyond it each chunk is projected again
KEEP_LOGITS_BYTES = 256 * 2**20
CHUNK_ROWS = 1024


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_start, vocab_rows, group):
        tp = dist.get_world_size(group) if group is not None else 1
        n = hidden.shape[0]
        local = labels - vocab_start
        mine = (local >= 0) & (local < vocab_rows)
        local = local.clamp(0, max(vocab_rows - 1, 0))
        keep = n * vocab_rows * hidden.element_size() <= KEEP_LOGITS_BYTES
        kept, logsumexp = [], torch.empty(n, dtype=torch.float32, device=hidden.device)
        picked = torch.zeros(n, dtype=torch.float32, device=hidden.device)
        used = weight[:vocab_rows]
        for start in range(0, n, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = hidden[rows] @ used.t()
            if vocab_rows:
                logsumexp[rows] = torch.logsumexp(logits.float(), dim=-1)
                picked[rows] = logits.gather(1, local[rows, None])[:, 0].float() * mine[rows]
            else:
                logsumexp[rows] = -torch.inf
            if keep:
                kept.append(logits)
        if tp > 1:
            # log(sum over ranks of exp(lse_r)): the maximum first, so that nothing overflows
            top = logsumexp.clone()
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            both = torch.stack((torch.exp(logsumexp - top), picked))
            dist.all_reduce(both, group=group)
            logsumexp, picked = both[0].log() + top, both[1]
        ctx.save_for_backward(hidden, weight, local, mine, logsumexp, *kept)
        ctx.vocab_rows = vocab_rows
        return picked - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, local, mine, logsumexp, *kept = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        rows_used = ctx.vocab_rows
        used = weight[:rows_used]
        chunks = range(0, hidden.shape[0], CHUNK_ROWS)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=weight.dtype if len(chunks) < 2 else torch.float32)
        for index, start in enumerate(chunks):
            rows = slice(start, start + CHUNK_ROWS)
            logits = kept[index] if kept else hidden[rows] @ used.t()
            # d logprob_i / d logit_j = [j is the label] - softmax_j
            g = torch.exp(logits.float().sub_(logsumexp[rows, None])).mul_(-grad[rows, None])
            if rows_used:
                g.scatter_add_(1, local[rows, None], (grad[rows] * mine[rows])[:, None])
            g = g.to(weight.dtype)
            if want_hidden:
                grad_hidden[rows] = g @ used
            if want_weight and len(chunks) < 2:
                torch.mm(g.t(), hidden[rows], out=grad_weight[:rows_used])
            elif want_weight:
                grad_weight[:rows_used] += g.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype) if want_weight else None, None, None, None, None


def label_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_start: int,
    vocab_rows: int,
    group=None,
) -> torch.Tensor:
    """log p(label) of each row, fp32 [n].

    hidden [n, h], equal on the tensor-parallel ranks of ``group``; weight [v, h]: this rank's rows of the output
    layer, of which the first ``vocab_rows`` are real (the rest is padding) and stand for the vocabulary from
    ``vocab_start``. labels [n] int64. The gradient of ``hidden`` is this rank's part: its sum over the group is whole.
    """
    return _LabelLogProbs.apply(hidden, weight, labels, vocab_start, vocab_rows, group)
