"""Packed rows are the same training as one document a row: loss and every gradient, at every layout."""

from __future__ import annotations

import pytest
import torch

from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for, make_batch, pack_batch, synthetic_rows
from tests.distributed.rank_functions import losses_and_gradients
from tests.distributed.test_transformers import hf_loss

VOCAB = family_models.COMMON["vocab_size"]
LONGEST, ROWS = 40, 4  # of a micro-batch
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
SP = {"sequence_parallel": True}
LORA = {"scheme": "lora", "dim": 4, "alpha": 12.0}
# (family, ranks, model arguments, other sections)
LAYOUTS = {
    "TP2 SP": ("llama", 2, {TP: 2, **SP}, {}),
    "TP2 LoRA recompute selective": (
        "llama, biases, linear rope",
        2,
        {TP: 2, "recompute_granularity": "selective"},
        {"peft": LORA},
    ),
    "PP4": ("llama", 4, {PP: 4}, {}),
    "PP2 virtual 2 recompute full": (
        "gemma2",
        2,
        {PP: 2, "virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "full"},
        {},
    ),
    "DP2": ("gpt2", 2, {}, {}),
    "EP2 TP2 SP": (
        "deepseek_v2",
        2,
        {TP: 2, **SP, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {},
    ),
}


def variants(copies: int) -> list[list[list[dict]]]:
    """One document a row; the same packed; packed with a boundary in a wrong place. Each by data-parallel rank."""
    rows = synthetic_rows(VOCAB, 4 * ROWS, LONGEST)
    micro = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
    shares = [micro[copy::copies] for copy in range(copies)]
    padded, packed, wrong = (
        [[make_batch(rows, LONGEST, kind) for rows in share] for share in shares] for kind in (False, True, True)
    )
    for share in wrong:
        share[0]["cu_seqlens"][1] += 1
    return [padded, packed, wrong]


def assert_packed_equals_padded(results) -> None:
    for padded, packed, wrong in results:
        assert packed[0] == pytest.approx(padded[0], abs=1e-6)
        assert abs(wrong[0] - padded[0]) > 1e-4
        assert set(packed[1]) == set(padded[1])
        for name, gradient in packed[1].items():
            torch.testing.assert_close(gradient, padded[1][name], rtol=1e-5, atol=1e-5, msg=name)
    # the comparison is about something
    assert max(gradient.abs().max() for gradient in results[0][0][1].values()) > 1e-2


def arguments(model: dict | None = None, **sections):
    return arguments_for(model, dataset={"packed_sequence": True}, **sections)


@pytest.mark.parametrize(
    "case", ["llama", "gemma2", "gpt2", "mixtral", "deepseek_v2", "phi3, window, partial rotary", "olmoe", "gpt_neox"]
)
def test_a_family_packed_equals_padded_and_transformers(case, tmp_path):
    folder = family_models.save(case, tmp_path)
    results = run_distributed(losses_and_gradients, 1, folder, arguments(), variants(1))
    assert_packed_equals_padded(results)
    model, total, count = family_models.build(case), 0.0, 0.0
    for ids, weights in synthetic_rows(VOCAB, 4 * ROWS, LONGEST):
        alone = make_batch([(ids, weights)], len(ids) - 1, packed=False)
        supervised = alone["loss_mask"].sum().item()
        with torch.no_grad():
            total, count = total + hf_loss(model, alone).item() * supervised, count + supervised
    assert results[0][1][0] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_packed_equals_padded(layout, tmp_path):
    case, ranks, model, sections = LAYOUTS[layout]
    folder = family_models.save(case, tmp_path)
    copies = 2 if "DP2" in layout else 1
    assert_packed_equals_padded(
        run_distributed(losses_and_gradients, ranks, folder, arguments(model, **sections), variants(copies))
    )


def test_a_packed_row_may_be_full_or_nearly_empty(tmp_path):
    """No padding at all, mostly padding, or a micro-batch without documents beside: the documents' numbers stay."""
    folder = family_models.save("llama", tmp_path)
    rows = synthetic_rows(VOCAB, 3, LONGEST)
    full = sum(len(ids) - 1 for ids, _ in rows)
    packs = [[[pack_batch(rows, length)]] for length in (full, full + 1, 3 * full)]
    packs.append([[pack_batch(rows, full), pack_batch([], full)]])
    exact, *others = run_distributed(losses_and_gradients, 1, folder, arguments(), packs)[0]
    for other in others:
        assert other[0] == pytest.approx(exact[0], abs=1e-6)
        for name, gradient in other[1].items():
            torch.testing.assert_close(gradient, exact[1][name], rtol=1e-5, atol=1e-5, msg=name)


def test_fractional_loss_weights_divide_by_their_sum(tmp_path):
    """Gradients are those of the mean over the weights, whatever they sum to."""
    folder = family_models.save("llama", tmp_path)
    rows = synthetic_rows(VOCAB, ROWS, LONGEST)
    scaled = [(ids, [0.3 * weight for weight in weights]) for ids, weights in rows]
    whole, part = run_distributed(
        losses_and_gradients, 1, folder, arguments(), [[[make_batch(some, LONGEST, True)]] for some in (rows, scaled)]
    )[0]
    assert part[0] == pytest.approx(whole[0], abs=1e-6)
    for name, gradient in part[1].items():
        torch.testing.assert_close(gradient, whole[1][name], rtol=1e-5, atol=1e-5, msg=name)
