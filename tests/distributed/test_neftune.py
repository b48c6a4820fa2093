"""NEFTune: the noise of a document is its seed's, at every layout and however it is batched; none in evaluation."""

from __future__ import annotations

import pytest
import torch

from primus_bridge.megatron.documents import Documents, Span
from primus_bridge.megatron.neftune import batch_noise, document_noise
from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import add_noise_seeds, arguments_for, make_batch, synthetic_rows
from tests.distributed.rank_functions import Built, train

STEPS, ALPHA = 3, 20.0
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
VOCAB, HIDDEN = family_models.COMMON["vocab_size"], family_models.COMMON["hidden_size"]
# ranks -> (model arguments, packed, micro batch size)
LAYOUTS: dict[int, list[tuple[dict, bool, int]]] = {
    1: [({}, True, 4), ({"recompute_granularity": "full"}, False, 4)],
    2: [(TP2, False, 2), (TP2 | SP, True, 4), (PP2, True, 2), (CP2, True, 4)],
    4: [(TP2 | SP | CP2, False, 2), (PP2 | {"virtual_pipeline_model_parallel_size": 2} | CP2, True, 2)],
}


def arguments(alpha: float | None, model: dict | None = None, packed: bool = False):
    return arguments_for(
        model,
        dataset={"packed_sequence": packed},
        optimizer={"lr": 1e-3},
        train={"train_iters": STEPS, "neftune_noise_alpha": alpha},
    )


def test_layouts_and_batches_make_the_same_noise(tmp_path):
    folder = family_models.save("gpt2", tmp_path)
    (single, quiet) = run_distributed(train, 1, folder, [(arguments(ALPHA), 1), (arguments(None), 1)], STEPS)[0]
    assert abs(single[0]["loss"] - quiet[0]["loss"]) > 1e-3
    for ranks, layouts in LAYOUTS.items():
        runs = [(arguments(ALPHA, model, packed), micro_batch) for model, packed, micro_batch in layouts]
        for results in run_distributed(train, ranks, folder, runs, STEPS):
            for layout, result in zip(layouts, results, strict=True):
                for got, want in zip(result, single, strict=True):
                    assert got["loss"] == pytest.approx(want["loss"], rel=2e-5), layout
                    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4), layout


def train_and_evaluate(folder: str, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(the loss of a training step, the loss of an evaluation before it), both of one batch."""
    from primus_bridge.megatron.step import evaluate, train_step
    from primus_bridge.objectives.supervised import supervised

    built = Built(folder, arguments(ALPHA))
    evaluated, _ = evaluate(built.wrapped, [[batch]], supervised, built.parallel)
    trained = train_step(built.wrapped, built.optimizer, built.scheduler, [batch], supervised, built.parallel)
    assert evaluated is not None
    return trained.loss, evaluated


@pytest.mark.parametrize("case", ["llama", "granite"])
def test_noise_is_added_to_the_embeddings_of_transformers(case, tmp_path):
    """Granite multiplies what it looked up: the noise is there before, as transformers' own is."""
    folder = family_models.save(case, tmp_path)
    rows = synthetic_rows(VOCAB, 4)
    batch = make_batch(rows, 24, packed=True, noise=True)
    trained, evaluated = run_distributed(train_and_evaluate, 1, folder, batch)[0]
    model = family_models.build(case)
    for alpha, got in ((ALPHA, trained), (0.0, evaluated)):
        total, count = 0.0, 0.0
        for row in rows:
            alone = add_noise_seeds(make_batch([row], len(row[0]) - 1, packed=False), [row])
            n, seed = int(alone["lengths"]), int(alone["noise_seeds"])
            with torch.no_grad():
                embedded = model.get_input_embeddings()(alone["tokens"]) + document_noise(seed, n, HIDDEN, alpha)
                logits = model(inputs_embeds=embedded).logits
            losses = torch.nn.functional.cross_entropy(logits[0], alone["labels"][0], reduction="none")
            mask = alone["loss_mask"][0]
            total, count = total + (losses * mask).sum().item(), count + mask.sum().item()
        assert got == pytest.approx(total / count, rel=1e-5)
    assert abs(trained - evaluated) > 1e-3


def test_padding_and_empty_rows_have_no_noise():
    documents = Documents((Span(0, 0, 3), Span(1, 0, 0)), False, (4, 0))
    noise = batch_noise(documents, rows=2, length=5, hidden_size=8, alpha=1.0)
    assert noise[:3, 0].abs().min() > 0
    assert noise[3:].abs().max() == noise[:, 1].abs().max() == 0


def test_the_size_of_the_noise():
    """Uniform in +-alpha / sqrt(tokens x hidden size), so a document's noise has the norm alpha / sqrt(3)."""
    noise = document_noise(5, 400, 64, 10.0)
    bound = 10.0 / (400 * 64) ** 0.5
    assert noise.abs().max() <= bound
    assert noise.abs().max() > 0.99 * bound
    assert noise.norm().item() == pytest.approx(10.0 / 3**0.5, rel=0.02)
    assert torch.equal(noise, document_noise(5, 400, 64, 10.0))
    assert not torch.equal(noise, document_noise(6, 400, 64, 10.0))
