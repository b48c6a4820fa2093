"""A step whose loss or gradient is no finite number changes nothing, on any rank, and the run does as it is told."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

from primus_bridge.callbacks.base import Callback, RunState
from primus_bridge.checkpoint.manifest import TRACKER, committed
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.report.notes import read_events
from primus_bridge.together import SharedError
from tests import family_models, tiny_models
from tests.cli import example
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import arguments_for
from tests.distributed.rank_functions import Built, leave_model_parallel

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
LORA = {"scheme": "lora", "dim": 4}


@dataclass(frozen=True)
class Case:
    """On one rank the gradient of the first parameter with ``part`` in its name becomes infinite, for one step."""

    arguments: BridgeArguments
    part: str = "linear_qkv.weight"
    rank: int = 0


def case(model: dict | None = None, part: str = "linear_qkv.weight", rank: int = 0, **sections) -> Case:
    sections = {"optimizer": {"lr": 1e-3, "weight_decay": 0.1}, **sections}
    return Case(arguments_for(model, **sections), part, rank)


ALONE = {
    "fp32": case(),
    "no clipping, whole optimizer": case(
        optimizer={"lr": 1e-3, "clip_grad": 0.0}, ddp={"use_distributed_optimizer": False}
    ),
    "bf16": case(mixed_precision="bf16_mixed"),
    "lora": case(peft=LORA, part="adapter"),
}
PAIR = {
    "tensor": case({TP: 2}, rank=1),
    "tensor, a copy that no norm counts": case({TP: 2}, "layer_norm_weight", 1),
    "data": case(rank=1),
    "pipeline": case({PP: 2}, rank=1),
    "pipeline, lora": case({PP: 2}, "adapter", peft=LORA),
}
EXPERTS = {
    "experts": case({EP: 2}, "experts", 1),
    "experts, whole optimizer, bf16": case(
        {EP: 2}, "experts", 1, mixed_precision="bf16_mixed", ddp={"use_distributed_optimizer": False}
    ),
}


@contextmanager
def poisoned(built: Built, case: Case) -> Iterator[None]:
    hook = None
    if torch.distributed.get_rank() == case.rank:
        named = built.parameters().items()
        parameter = next(p for name, p in named if case.part in name and p.requires_grad)
        hook = parameter.register_hook(lambda gradient: gradient * torch.inf)
    yield
    if hook is not None:
        hook.remove()


def state(built: Built) -> list[torch.Tensor]:
    """Copies of this rank's weights, and of its optimizer's moments, masters and counts."""
    tensors = list(built.parameters().values())
    for part in built.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors += [*group["params"], torch.tensor(float(group.get("step", 0)))]
        for values in part.optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def steps(folder: str, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Of each case: three steps of which the second is poisoned, and the same without an update at the second."""
    found = {}
    for name, case in cases.items():
        built = Built(folder, case.arguments)
        first = built.steps(0, 1)
        before = state(built)
        with poisoned(built, case):
            second = built.steps(1, 2)
        kept = equal(before, state(built))
        last, end = built.steps(2, 3), state(built)
        built.close()
        built = Built(folder, case.arguments)
        same = built.steps(0, 1) == first
        built.scheduler.step(increment=1)
        same = same and built.steps(2, 3) == last and equal(state(built), end)
        built.close()
        found[name] = {"steps": [*first, *second, *last], "kept": kept, "as if left out": same}
    return found


def check(ranks: list[dict[str, dict[str, Any]]]) -> None:
    for rank, cases in enumerate(ranks):
        for name, found in cases.items():
            assert [step["updated"] for step in found["steps"]] == [True, False, True], (name, rank)
            assert found["kept"] and found["as if left out"], (name, rank)
            first, second, last = (step["grad_norm"] for step in found["steps"])
            assert 0 < first < torch.inf and 0 < last < torch.inf and not second < torch.inf, (name, rank)
            assert found["steps"][0] == ranks[0][name]["steps"][0], (name, rank)


def test_a_gradient_on_one_rank_changes_nothing_on_any(tmp_path):
    folder = tiny_models.save("llama", tmp_path / "llama", num_hidden_layers=2)
    check(run_distributed(steps, 1, folder, ALONE))
    check(run_distributed(steps, 2, folder, PAIR))


def test_nor_do_experts_with_an_optimizer_of_their_own(tmp_path):
    folder = family_models.save("mixtral", tmp_path / "mixtral")
    check(run_distributed(steps, 2, str(folder), EXPERTS))


WORD = "199"
"""A batch with it gets an infinite loss."""
TOKEN = 2 + int(WORD)
TRAINED = dict(shuffle=False, save_interval=2, tensorboard=False)


def infinite(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]):
    from primus_bridge.objectives.supervised import supervised

    loss, count, metrics = supervised(log_probs, batch)
    times = torch.where((batch["tokens"] == TOKEN).any(), torch.inf, 1.0)
    return loss * times, count, metrics | {"loss": metrics["loss"] * torch.stack([times, torch.ones(())])}


def train(words: list[str], *callbacks: Callback) -> dict[str, Any]:
    """The run of ``train`` with these words in this rank: its result, or the error that ended it; what it printed."""
    from primus_bridge.config import load_arguments
    from primus_bridge.registry import BackendRegistry

    arguments = load_arguments(None, words[1:], None)
    adapter = BackendRegistry.get_adapter(arguments.framework)
    adapter.prepare_backend(arguments)
    kind = adapter.load_trainer_class(arguments.stage)
    kind = type("Poisoned", (kind,), {"objective": lambda self: infinite})
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trainer = kind(arguments, module_rank=rank, module_world_size=world)
    trainer.callbacks += callbacks
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            result: dict[str, Any] = dict(trainer.run())
        except SharedError as error:
            result = {"error": str(error)}
            leave_model_parallel()
    return {**result, "out": out.getvalue()}


class DamagesAndStops(Callback):
    """Flips a bit of the checkpoint of step 6 once it stands; ends the run a step after it has gone back."""

    def on_save(self, state: RunState, path: str | Path) -> None:
        if state.step == 6:
            shard = max(Path(path).glob("*.distcp"), key=lambda one: one.stat().st_size)
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 4
            shard.write_bytes(data)

    def on_step_end(self, state: RunState, metrics: dict[str, Any]) -> None:
        if state.rollbacks:
            state.request_stop("enough")


def train_all(runs: list[list[str]]) -> list[dict[str, Any]]:
    return [train(words) for words in runs]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with example.workplace(tmp_path_factory.mktemp("nonfinite")) as place:
        yield place


def words(save: str, *poisoned: int, **options) -> list[str]:
    """A run over 32 rows in batches of four; the given batches, counted from 1, have the word."""
    made = example.alpaca_rows(32)
    for batch in poisoned:
        made[4 * batch - 2]["instruction"] += f" {WORD}"
    data = example.write_rows(Path(f"rows{'_'.join(map(str, poisoned))}.json"), made)
    return example.train_words("model", data, save, **{"train_iters": 8, **TRAINED, **options})


def weights(file: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def events(save: str) -> list[tuple[str, int]]:
    """Without that of the export."""
    found = [(entry["event"], entry["step"]) for entry in read_events(Path(save))]
    return [event for event in found if event[0] != "export"]


def test_stop_and_skip(place):
    runs = [
        words("stop", 3),
        words("row", 3, 4, 5, on_nonfinite="skip", max_nonfinite=2),
        words("skip", 3, 4, 6, on_nonfinite="skip", max_nonfinite=2, pipeline_model_parallel_size=2),
    ]
    stop, row, skip = run_distributed(train_all, 2, runs)[0]
    # data-parallel: rank 1 alone has the row
    assert stop["error"].startswith("training diverged at step 3 (loss inf, gradient norm nan); nothing of that step")
    assert events("stop") == [("start", 0), ("save", 2), ("error", 2)]

    assert (skip["step"], skip["nonfinite_steps"], skip["rollbacks"]) == (8, 3, 0)
    assert skip["out"].count("WARNING") == 3
    assert "WARNING   step 4: loss inf, gradient norm nan;" in skip["out"]
    assert "(2 in a row, max_nonfinite 2; 2 in all)" in skip["out"]
    lines = example.loss_lines(place / "skip")
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 4, 6]
    assert [line.get("nonfinite_steps", 0) for line in lines] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert "Steps not finite" in Path("skip/report.html").read_text()

    assert row["error"].startswith("training diverged at step 5 (loss inf, gradient norm nan); the 2 steps before it")


ROLLBACK = dict(on_nonfinite="rollback", train_iters=None, num_epochs=0.75, convert_to_hf=True)
LORA_RUN = dict(use_lora=True, lora_rank=4, lora_dropout=0.1, mixed_precision="bf16_mixed", **ROLLBACK)


def test_rollback_and_the_same_run_killed_after_it(place):
    """The fourth batch is bad: step 4 takes step 3 back with it, which then has the fifth batch."""
    first, second = run_distributed(train, 2, words("whole", 4, **LORA_RUN))
    for result in (first, second):
        assert (result["step"], result["nonfinite_steps"], result["rollbacks"]) == (6, 1, 1)
    assert first["out"].count("WARNING") == 1 and "WARNING" not in second["out"]
    assert "back at the checkpoint of step 2, steps 3 to 4 again with the data after it (rollback 1," in first["out"]
    assert events("whole") == [
        ("start", 0), ("save", 2), ("rollback", 2), ("save", 4), ("save", 6), ("end", 6),
    ]  # fmt: skip
    lines = example.loss_lines(place / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.get("rollbacks", 0) for line in lines] == [0, 0, 1, 1, 1, 1]
    manifest = json.loads(Path("whole/iter_0000006/manifest.json").read_text())
    assert manifest["consumed_samples"] == 4 * (6 + 2)
    assert "Rollbacks" in Path("whole/report.html").read_text()

    # as a kill after the checkpoint of step 4 leaves it
    shutil.copytree("whole", "killed", ignore=shutil.ignore_patterns("iter_0000006", "hf"))
    last = run_distributed(train, 2, words("killed", 4, **LORA_RUN))[0]
    assert (last["step"], last["nonfinite_steps"], last["rollbacks"]) == (6, 1, 1)
    assert f"continuing {Path('killed/iter_0000004')} at step 4" in last["out"]
    same = ("step", "loss", "grad_norm", "lr", "tokens", "rollbacks")
    assert [[line.get(key) for key in same] for line in example.loss_lines(place / "killed")] == [
        [line.get(key) for key in same] for line in lines
    ]
    one, other = (weights(f"{save}/hf/adapter_model.safetensors") for save in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_a_save_in_flight_and_the_ends_of_rollbacks(place):
    runs = [
        words("late", 1, on_nonfinite="rollback"),
        words("once", 3, 4, on_nonfinite="rollback", max_nonfinite=1),
        words("again", 3, 4, 5, 6, on_nonfinite="rollback"),
        words("sync", 4, **ROLLBACK),
        words("async", 4, async_save=True, **ROLLBACK),
    ]
    (results,) = run_distributed(train_all, 1, runs)
    late, once, again, sync, flight = results
    assert sync["rollbacks"] == flight["rollbacks"] == 1
    one, other = (weights(f"{save}/hf/model.safetensors") for save in ("sync", "async"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    assert "there is no checkpoint in save to go back to yet" in late["error"]
    assert "the run has had all of its rollbacks, max_nonfinite 1" in once["error"]
    assert "gone back to the checkpoint of step 2 3 times" in again["error"]
    assert events("again") == [("start", 0), ("save", 2), *[("rollback", 2)] * 3, ("error", 2)]


def test_back_past_a_damaged_checkpoint(place):
    """It is not taken for the newest one again: the checkpoint that follows stays."""
    run = words("past", 7, on_nonfinite="rollback", save_total_limit=1, keep_every=4)
    (result,) = run_distributed(train, 1, run, DamagesAndStops())
    assert "back at the checkpoint of step 4, steps 5 to 7 again" in result["out"] and result["step"] == 5
    assert [folder.name for folder in committed(place / "past")] == ["iter_0000004", "iter_0000005"]
    assert (place / "past" / "damaged_iter_0000006").is_dir()
    assert (place / "past" / TRACKER).read_text() == "5"
