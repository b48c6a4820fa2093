"""Against transformers: logits, the first loss, every gradient, and ten AdamW steps of a single-rank run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for, pad_batch, synthetic_rows
from tests.distributed.rank_functions import Built
from tests.distributed.test_round_trip import tensors

# the steps of AdamW are the same for all: one of each kind of layer
TRAINED = ("llama, tied, llama3 rope", "gemma2", "gpt2", "mixtral", "deepseek_v3")
LENGTH = 96  # longer than the windows, and than the original context of the scaled ropes
LR, WEIGHT_DECAY = 1e-3, 0.1


def megatron(folder: str, target: str, steps: int):
    """(logits, loss, losses of ``steps`` steps) of a single Megatron rank; gradients go to ``target`` by HF names."""
    from primus_bridge.conversion.export import ExportOptions, export_model

    arguments = arguments_for(
        optimizer={"lr": LR, "weight_decay": WEIGHT_DECAY, "clip_grad": 1.0},
        scheduler={"lr_decay_style": "constant"},
        train={"train_iters": 10},
        model={"seq_length": LENGTH},
    )
    built = Built(folder, arguments)
    arch, family = built.model.architecture, built.model.family
    chunk = built.chunks[0]
    with torch.no_grad():
        logits = chunk.logits(torch.arange(2 * LENGTH).view(2, LENGTH) % arch.vocab_size)
    batch = long_batch(arch.vocab_size)
    log_probs = chunk(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"]
    )
    loss = -(log_probs * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    trained = {name: p for name, p in built.parameters().items() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    # what has no gradient, the router's bias, goes along as it is
    named = {**built.parameters(), **dict(zip(trained, gradients, strict=True))}
    export_model(named, family, arch, built.parallel, Path(target), ExportOptions((), torch.float32, 10**9))
    losses = [step["loss"] for step in built.steps(0, steps)]
    built.close()
    return logits, loss.item(), losses


def long_batch(vocab_size: int) -> dict[str, torch.Tensor]:
    return pad_batch(synthetic_rows(vocab_size, 4, longest=LENGTH), LENGTH)


def hf_gradients(model, folder: Path) -> dict[str, torch.Tensor]:
    """A model's gradients by the names that transformers saves weights under."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        model.save_pretrained(folder)
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return tensors(folder)


def hf_loss(model, batch) -> torch.Tensor:
    logits = model(batch["tokens"]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()


@pytest.mark.parametrize("case", family_models.CASES)
def test_logits_gradients_and_steps_equal_transformers(case, tmp_path):
    folder = family_models.save(case, tmp_path / "hf")
    steps = 10 if case in TRAINED else 0
    logits, loss, losses = run_distributed(megatron, 1, folder, str(tmp_path / "ours"), steps)[0]
    model = family_models.build(case)
    vocab = model.config.vocab_size
    with torch.no_grad():
        want = model(torch.arange(2 * LENGTH).view(2, LENGTH) % vocab).logits
    assert want.abs().max() > 0.5  # the comparison is about something
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)

    first = hf_loss(model, long_batch(vocab))
    assert loss == pytest.approx(first.item(), abs=1e-5)
    first.backward()
    expected, gradients = hf_gradients(model, tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    if not steps:
        return

    rows = synthetic_rows(vocab, 80)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    hf_losses = []
    for step in range(10):
        optimizer.zero_grad()
        hf_losses.append(hf_loss(model, pad_batch(rows[8 * step : 8 * step + 8], 24)))
        hf_losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses == pytest.approx([value.item() for value in hf_losses], rel=1e-5)
    assert len({round(value, 4) for value in losses}) == 10
