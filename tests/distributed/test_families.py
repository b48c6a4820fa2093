"""Every family at every layout: each byte comes back, and the loss and gradient norm are transformers' own.

A job of 1, 2 and 4 ranks runs all layouts of a case; a test looks at one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from primus_bridge.conversion.families import families
from tests import family_models
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for, pad_batch, synthetic_rows
from tests.distributed.rank_functions import family_results
from tests.distributed.test_round_trip import tensors
from tests.distributed.test_transformers import hf_loss

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {TP: 2}),
    "PP2": (2, {PP: 2}),
    "TP4": (4, {TP: 4}),
    "TP2 PP2 SP": (4, {TP: 2, PP: 2, **SP}),
}
# experts beside tensor parallelism need sequence parallelism
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2 SP": (2, {TP: 2, **SP}),
    "PP2": (2, {PP: 2}),
    "EP2": (2, {EP: 2}),
    "TP2 ETP1 SP": (2, {TP: 2, ETP: 1, **SP}),
    "TP2 EP2 ETP1 SP": (2, {TP: 2, EP: 2, ETP: 1, **SP}),
    "TP4 SP": (4, {TP: 4, **SP}),
    "TP2 EP2 SP": (4, {TP: 2, EP: 2, **SP}),
    "PP2 EP2": (4, {PP: 2, EP: 2}),
}
WITH_EXPERTS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3")


def layouts(case: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """All of them for the first case of a family; the others differ in what two ranks show."""
    prefix = family_models.CASES[case].prefix
    every = EXPERT_LAYOUTS if prefix in WITH_EXPERTS else LAYOUTS
    first = next(name for name, other in family_models.CASES.items() if other.prefix == prefix)
    return {name: layout for name, layout in every.items() if layout[0] < 4 or case == first or "MQA" in case}


class Runs:
    """What the ranks of each job found, and transformers' own numbers; all made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.results: dict[tuple[str, int], list[list]] = {}
        self.references: dict[str, tuple[float, float]] = {}

    def of(self, case: str) -> Path:
        """The case's model folder."""
        path = self.folder / case
        if not path.exists():
            family_models.save(case, path)
        return path

    def found(self, case: str, layout: str) -> tuple[Any, Path]:
        """(what each rank found, the exported folder)."""
        ranks = layouts(case)[layout][0]
        target = self.folder / f"out{ranks}" / case
        names = [name for name, (needed, _) in layouts(case).items() if needed == ranks]
        if (case, ranks) not in self.results:
            runs = [arguments_for(layouts(case)[name][1] | {"seq_length": 24}) for name in names]
            self.results[case, ranks] = run_distributed(family_results, ranks, str(self.of(case)), runs, str(target))
        number = names.index(layout)
        return [result[number] for result in self.results[case, ranks]], target / str(number)

    def reference(self, case: str) -> tuple[float, float]:
        """transformers' loss and gradient norm of the first step's batch."""
        if case not in self.references:
            model = family_models.build(case)
            loss = hf_loss(model, pad_batch(synthetic_rows(family_models.COMMON["vocab_size"], 8), 24))
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.references[case] = (loss.item(), torch.nn.utils.get_total_norm(gradients).item())
        return self.references[case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(
    ("case", "layout"), [(case, layout) for case in family_models.CASES for layout in layouts(case)], ids=str
)
def test_a_family_at_a_layout(runs, case, layout):
    found, exported = runs.found(case, layout)
    for rank, result in enumerate(found):
        assert not isinstance(result, str), f"rank {rank}: {result}"
    want, got = tensors(runs.of(case)), tensors(exported)
    assert set(got) == set(want)
    for name, value in want.items():
        assert torch.equal(got[name].view(torch.uint8), value.view(torch.uint8)), name
    loss, norm = runs.reference(case)
    assert found[0] == pytest.approx((loss, norm), rel=1e-5)


def test_every_supported_model_type_is_tried(runs):
    import json

    tried = {json.loads((runs.of(case) / "config.json").read_text())["model_type"] for case in family_models.CASES}
    assert tried == set(families())
