"""Adapters that peft made, in at every layout: the same logits and training steps, and the same bytes out again."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import peft_adapters
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for, pad_batch, synthetic_rows
from tests.distributed.rank_functions import Built, leave_model_parallel, save_and_resume
from tests.distributed.test_round_trip import tensors
from tests.distributed.test_transformers import hf_loss

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[int, dict[str, dict]] = {1: {"TP1": {}}, 2: {"TP2": TP2, "PP2": PP2}}
TRAINED: dict[int, dict[str, dict]] = {1: {"TP1": {}}, 2: {"TP2+SP": TP2 | {"sequence_parallel": True}, "PP2": PP2}}
PIPELINED = ("llama, patterns", "llama, some layers", "llama, all but", "deepseek_v3")
TRAINED_ADAPTERS = (
    "llama, list",
    "llama, patterns",
    "llama, some layers",
    "llama, all but",
    "gpt2, dora",
    "deepseek_v3",
)
LENGTH, STEPS = 40, 3
Jobs = list[tuple[str, str, str]]


def export(built: Built, target: Path, model: str) -> None:
    from primus_bridge.conversion.adapters import adapter_config, export_adapter
    from primus_bridge.conversion.export import ExportOptions
    from primus_bridge.conversion.hf_folder import float_dtype

    others = {key: float_dtype(dtype) for key, dtype in built.adapter.other_dtypes.items()}
    config = adapter_config(built.plan, 0.0, model, built.adapter.record(built.plan)["config"])
    options = ExportOptions((), built.adapter.dtype, 10**9, others)
    export_adapter(built.chunks, built.plan, built.parallel, target, options, config)


def through(jobs: Jobs, layouts: dict[str, dict], out: str) -> dict[tuple[str, str], Any]:
    """Each (name, model, adapter) at each layout: in, and out to ``out``/layout/name, also merged; logits (None on
    pipelines)."""
    from primus_bridge.conversion.export import ExportOptions, export_model
    from primus_bridge.peft.merge import MergedParameters

    def once(built: Built, target: Path, model: str) -> Any:
        export(built, target, model)
        merged, options = MergedParameters(built.chunks), ExportOptions((), torch.float32, 10**9)
        family, arch = built.model.family, built.model.architecture
        export_model(merged, family, arch, built.parallel, target.with_name(target.name + " merged"), options)
        if built.parallel.pp_size > 1:
            return None
        with torch.no_grad():
            return built.chunks[0].eval().logits(torch.arange(2 * LENGTH).view(2, LENGTH))

    return each(jobs, layouts, out, once, optimizer=False)


def trained(jobs: Jobs, layouts: dict[str, dict], out: str) -> dict[tuple[str, str], Any]:
    """Each (name, model, adapter) at each layout: losses of STEPS steps; what comes of it in ``out``/layout/name."""

    def once(built: Built, target: Path, model: str) -> Any:
        losses = [step["loss"] for step in built.steps(0, STEPS, micro_batch=4)]
        export(built, target, model)
        return losses

    return each(jobs, layouts, out, once, optimizer=True)


def mixed_precision(jobs: Jobs, precision: str) -> list[float]:
    (_, model, adapter), *_ = jobs
    arguments = arguments_for(optimizer={"lr": 1e-2}, mixed_precision=precision)
    return [step["loss"] for step in Built(model, arguments, adapter=adapter).steps(0, STEPS)]


def each(jobs: Jobs, layouts: dict[str, dict], out: str, once, optimizer: bool) -> dict[tuple[str, str], Any]:
    results: dict[tuple[str, str], Any] = {}
    for name, model, adapter in jobs:
        for layout, sizes in layouts.items():
            if layout == "PP2" and name not in PIPELINED:
                continue
            arguments = arguments_for(
                sizes,
                optimizer={"lr": 1e-2, "weight_decay": 0.0},
                scheduler={"lr_decay_style": "constant"},
                train={"train_iters": STEPS},
            )
            try:
                built = Built(model, arguments, optimizer=optimizer, adapter=adapter)
                results[name, layout] = once(built, Path(out) / layout / name, model)
                built.close()
            except Exception:
                results[name, layout] = traceback.format_exc()
                leave_model_parallel()
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name in peft_adapters.ADAPTERS:
        peft_adapters.save(name, root / name)
    return root


def at_layouts(
    function, root: Path, names, layouts: dict[int, dict[str, dict]], out: str
) -> dict[tuple[str, str], Any]:
    jobs = [(name, str(root / name / "model"), str(root / name / "adapter")) for name in names]
    results: dict[tuple[str, str], Any] = {}
    for ranks, sizes in layouts.items():
        results |= run_distributed(function, ranks, jobs, sizes, str(root / out))[0]
    return results


@pytest.fixture(scope="module")
def logits(root):
    return at_layouts(through, root, peft_adapters.ADAPTERS, LAYOUTS, "out")


@pytest.fixture(scope="module")
def losses(root):
    return at_layouts(trained, root, TRAINED_ADAPTERS, TRAINED, "trained")


@pytest.mark.parametrize("name", peft_adapters.ADAPTERS)
def test_in_and_out_again(name, root, logits):
    from transformers import AutoModelForCausalLM

    model, adapter = root / name / "model", root / name / "adapter"
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    before, want = peft_adapters.logits(str(model), str(adapter), ids)
    assert (want - before).abs().max() > 0.01  # the adapter does something
    mine, theirs = tensors(adapter), json.loads((adapter / "adapter_config.json").read_text())
    for layout in [layout for at, layout in logits if at == name]:
        out = root / "out" / layout / name
        found = logits[name, layout]
        assert not isinstance(found, str), f"{layout}: {found}"
        if layout != "PP2":
            torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
        got = tensors(out)
        assert set(got) == set(mine), layout
        for key, value in mine.items():
            assert got[key].dtype == value.dtype and torch.equal(got[key], value), (layout, key)
        config = json.loads((out / "adapter_config.json").read_text())
        assert {key for key in theirs if config[key] != theirs[key]} <= {"base_model_name_or_path"}, layout
    merged = AutoModelForCausalLM.from_pretrained(root / "out" / "TP2" / f"{name} merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, want, rtol=0, atol=1e-5)


def test_adapters_in_some_layers_resume_at_another_layout(root, tmp_path):
    """Their optimizer's state too: four steps are two and two, though one pipeline stage has nothing to train."""
    model, adapter = (str(root / "llama, some layers" / kind) for kind in ("model", "adapter"))
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    optimizer = {"lr": 1e-2, "weight_decay": 0.0}
    tensor, pipeline = (arguments_for(layout, optimizer=optimizer, train={"train_iters": 4}) for layout in (TP2, PP2))
    other = str(tmp_path / "other")
    jobs = [(tensor, whole, 0, 4, None), (tensor, part, 0, 2, None), (pipeline, part, 2, 4, part)]
    jobs += [(pipeline, other, 0, 2, None), (pipeline, other, 2, 3, other), (tensor, other, 3, 4, other)]
    unbroken, *parts = run_distributed(save_and_resume, 2, model, jobs, adapter)[0]
    want = [step["loss"] for step in unbroken["steps"]]
    for several in (parts[:2], parts[2:]):
        got = [step["loss"] for one in several for step in one["steps"]]
        assert got == pytest.approx(want, rel=1e-5)


def test_bf16_stays_near_fp32(root):
    name = "llama, all but"
    jobs = [(name, str(root / name / "model"), str(root / name / "adapter"))]
    narrow, wide = (run_distributed(mixed_precision, 1, jobs, precision)[0] for precision in ("bf16_mixed", "fp32"))
    assert narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize("name", TRAINED_ADAPTERS)
def test_steps_equal_peft(name, root, losses):
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(root / name / "model", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, root / name / "adapter", is_trainable=True)
    weights = {key: p for key, p in theirs.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    rows = synthetic_rows(base.config.vocab_size, 8 * STEPS)
    want = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = hf_loss(theirs, pad_batch(rows[8 * step : 8 * step + 8], 24))
        want.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
    assert len({round(loss, 4) for loss in want}) == STEPS
    for layout in [layout for at, layout in losses if at == name]:
        got = losses[name, layout]
        assert not isinstance(got, str), f"{layout}: {got}"
        assert got == pytest.approx(want, rel=1e-5), layout
        after = tensors(root / "trained" / layout / name)
        for key, value in weights.items():
            key = key.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
            # a step of AdamW is as long as its rate whatever the gradient, so rounding shows where that is near 0
            assert (after[key] - value.detach()).abs().mean() < 1e-4, (layout, key)
