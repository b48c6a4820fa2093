"""Against transformers: logits, the first loss, every gradient, and ten AdamW steps of a single-rank run."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for, pad_batch, synthetic_rows
from tests.distributed.rank_functions import Built

MODELS = {
    "llama": ("llama", {}),
    "llama tied, llama3 rope": ("llama", {"tie_word_embeddings": True, "rope": tiny_models.LLAMA3_ROPE}),
    "llama linear rope": ("llama", {"rope": tiny_models.LINEAR_ROPE}),
    "llama MHA, yarn rope": ("llama", {"num_key_value_heads": 8, "rope": tiny_models.YARN_ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
}
LENGTH = 96  # longer than the original context of the scaled ropes
LR, WEIGHT_DECAY = 1e-3, 0.1


def megatron(folder: str):
    """(logits, loss, HF-named gradients, losses of ten steps) of a single Megatron rank."""
    from primus_bridge.conversion.rules import placed_rules

    arguments = arguments_for(
        optimizer={"lr": LR, "weight_decay": WEIGHT_DECAY, "clip_grad": 1.0},
        scheduler={"lr_decay_style": "constant"},
        train={"train_iters": 10},
    )
    built = Built(folder, arguments)
    arch = built.model.architecture
    chunk = built.chunks[0]
    with torch.no_grad():
        logits = chunk.logits(torch.arange(2 * LENGTH).view(2, LENGTH) % arch.vocab_size)
    batch = pad_batch(synthetic_rows(arch.vocab_size, 8), 24)
    log_probs = chunk(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"]
    )
    loss = -(log_probs * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    names, leaves = zip(*built.parameters().items(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    by_hf_name = {}
    for placed in placed_rules(built.model.family.rules, arch):
        for template, gradient in placed.rule.export([gradients[placed.megatron]], arch).items():
            by_hf_name[template.format(layer=placed.layer)] = gradient
    losses = [step["loss"] for step in built.steps(0, 10)]
    built.close()
    return logits, loss.item(), {name: gradient.clone() for name, gradient in by_hf_name.items()}, losses


def hf_loss(model, batch) -> torch.Tensor:
    logits = model(batch["tokens"]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_ten_steps_equal_transformers(name, tmp_path):
    kind, changes = MODELS[name]
    folder = tiny_models.save(kind, tmp_path, **changes)
    logits, loss, gradients, losses = run_distributed(megatron, 1, folder)[0]
    model = tiny_models.build(kind, **changes)
    vocab = model.config.vocab_size
    with torch.no_grad():
        want = model(torch.arange(2 * LENGTH).view(2, LENGTH) % vocab).logits
    assert want.abs().max() > 0.5  # the comparison is about something
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)

    rows = synthetic_rows(vocab, 80)
    first = hf_loss(model, pad_batch(rows[:8], 24))
    assert loss == pytest.approx(first.item(), abs=1e-5)
    first.backward()
    expected = dict(model.named_parameters())
    assert set(gradients) == set(expected)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter].grad, rtol=1e-4, atol=1e-5, msg=parameter)

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
