"""Activation recompute: the same losses and gradients, to the bit, and less memory between forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for, pad_batch, synthetic_rows

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WAYS = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "uniform 1": FULL,
    "uniform 2": {**FULL, "recompute_num_layers": 2},
    "block 2": {**FULL, "recompute_method": "block", "recompute_num_layers": 2},
}
LORA = {"peft": {"scheme": "lora", "dim": 4, "alpha": 12.0, "target_modules": ["all-linear"]}}
LONGEST = 256


def passes(folder: str, runs: list) -> list[tuple[float, dict[str, torch.Tensor], int]]:
    """Of each arguments, after a step (LoRA's B starts at 0): (loss, gradients by name, bytes of activations)."""
    from primus_bridge.megatron.memory import MemoryWatch
    from primus_bridge.megatron.step import run_schedule
    from primus_bridge.objectives.supervised import supervised
    from tests.distributed.rank_functions import Built

    found = []
    for arguments in runs:
        built = Built(folder, arguments)
        built.steps(0, 1)
        batch = pad_batch(synthetic_rows(built.model.architecture.vocab_size, 4, LONGEST), LONGEST)
        for chunk in built.wrapped:
            chunk.zero_grad_buffer()
        built.optimizer.zero_grad()
        watch = MemoryWatch(built.wrapped, built.optimizer)
        watch.begin_step([batch])
        metrics = run_schedule(built.wrapped, [batch], supervised, built.parallel, forward_only=False)
        watch.end_step()
        gradients = {
            name: parameter.main_grad.clone()
            for name, parameter in built.parameters().items()
            if parameter.requires_grad
        }
        found.append((metrics["loss"][0], gradients, watch.phases().activations))
        built.close()
    return found


@pytest.mark.parametrize(
    ("sections", "names"), [({}, list(WAYS)), (LORA, ["none", "uniform 1"])], ids=["all weights", "LoRA"]
)
def test_the_same_gradients_in_less_memory(sections, names, tmp_path):
    folder = tiny_models.save("llama", tmp_path, tie_word_embeddings=False)
    options = {"optimizer": {"lr": 1e-2}, "train": {"train_iters": 2}, **sections}
    runs = [arguments_for({"seq_length": LONGEST, **WAYS[name]}, **options) for name in names]
    found = dict(zip(names, run_distributed(passes, 1, folder, runs)[0], strict=True))
    loss, gradients, most = found["none"]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, (again, same, _) in found.items():
        assert again == loss, name
        assert same.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert torch.equal(same[key], gradient), (name, key)
    taken = {name: activations / most for name, (_, _, activations) in found.items()}
    assert taken["uniform 1"] < 0.65
    # of the attention alone only what lies inside it, which the fused kernel does not keep in the first place
    for name, limit in {"selective": 1, "uniform 2": 0.65, "block 2": 0.65}.items():
        assert name not in taken or taken["uniform 1"] < taken[name] < limit, name


@pytest.mark.parametrize("adapters", [{}, LORA], ids=["all weights", "LoRA"])
def test_the_same_dropout_on_ranks_that_share_the_sequence(adapters, tmp_path):
    """Every dropout at once: each draws what it drew in the first pass, and other numbers than the ones before it."""
    folder = tiny_models.save("llama", tmp_path, tie_word_embeddings=False)
    options = {"optimizer": {"lr": 1e-2}, "train": {"train_iters": 2}, **adapters}
    if adapters:
        options["peft"] = {**adapters["peft"], "dropout": 0.1}
    model = {"seq_length": LONGEST, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    model |= {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    runs = [arguments_for({**model, **WAYS[name]}, **options) for name in ("none", "selective", "uniform 1")]
    for (loss, gradients, _), *others in run_distributed(passes, 2, folder, runs):
        for again, same, _ in others:
            assert again == loss
            for key, gradient in gradients.items():
                assert torch.equal(same[key], gradient), key
