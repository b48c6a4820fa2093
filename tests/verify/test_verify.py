"""primus verify on real ranks: every family equal, and deliberate differences found and placed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from primus_bridge.verify.plan import Options
from primus_bridge.verify.table import verdict_of
from tests import family_models
from tests.distributed.harness import run_distributed
from tests.verify.released import RELEASED

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
SPLIT, STAGES, EXPERTS = {TP: 2}, {PP: 2}, {EP: 2}
LAYOUTS = {
    "mistral-7b-v0.1": SPLIT | {"sequence_parallel": True},
    "gemma-2-9b": SPLIT | {"sequence_parallel": True},
    "mixtral-8x7b": SPLIT | {EP: 2, "expert_tensor_parallel_size": 1},
    "qwen3-30b-a3b": EXPERTS,
    "deepseek-v3": EXPERTS,
    "olmoe-1b-7b": SPLIT,
    "qwen2.5-7b": {},
    "granite-3-8b": STAGES,
    "gpt2": STAGES,
    "falcon-7b": STAGES,
    "pythia-1b": STAGES,
    "phi-3.5-mini": STAGES,
    "deepseek-v2": STAGES,
}
"""On two ranks; the others: tensor parallel. Without sizes: data parallel."""


def run_jobs(jobs: list[dict]) -> list[dict]:
    """The JSON report of each job's options, in this rank."""
    from primus_bridge.verify.run import verify

    return [verify(Options(**job)).to_json() for job in jobs]


def test_every_family_equals_transformers(tmp_path):
    jobs = []
    for name, config in RELEASED.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        jobs.append({"hf": str(folder), "shrink": True, "batch": 2, "device": "cpu", **LAYOUTS.get(name, SPLIT)})
    reports, others = run_distributed(run_jobs, 2, jobs)
    assert reports == others
    for name, report in zip(RELEASED, reports, strict=True):
        if any("transformers 4" in note for note in report["notes"]):
            assert not report["equal"] and report["first"]["stage"] == "layer 0", name
            continue
        assert report["equal"], (name, verdict_of(report), report)
        assert report["first"] is None and report["tolerance"] <= 2e-5
        stages = [stage["stage"] for stage in report["stages"]]
        layers = [f"layer {layer}" for layer in range(len(stages) - 5)]
        assert stages == ["embedding", *layers, "final norm", "logits", "loss", "gradients"]
        assert layers and all(stage["reference_max"] > 0.01 for stage in report["stages"][:-1]), name
        # nothing is there in name only, but for an expert that no token may have chosen
        for tensor, gradient in report["gradients"].items():
            assert gradient["reference_max"] > 0 or ".experts." in tensor, (name, tensor)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "llama"
    family_models.save("llama", folder, num_key_value_heads=8)
    return folder


def changed(folder: Path, target: Path, change=lambda tensors: None, **config) -> str:
    """A copy of a model folder with other weights or another config."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    whole = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(whole | config))
    return str(target)


Q, K = "model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.k_proj.weight"


def swap_q_and_k(tensors) -> None:
    tensors[Q], tensors[K] = tensors[K], tensors[Q]


def scaled(name: str, factor: float):
    def change(tensors) -> None:
        tensors[name] = tensors[name] * factor

    return change


DIFFERENCES = {
    "q and k of layer 2 exchanged": (swap_q_and_k, {}, "layer 2", "attention", (Q, K)),
    "rope base": (None, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "layer 0", "attention", None),
    "norm epsilon": (None, {"rms_norm_eps": 3e-5}, "layer 0", "attention", None),
    "embedding": (
        lambda tensors: tensors["model.embed_tokens.weight"].mul_(1.01),
        {},
        "embedding",
        None,
        ("model.embed_tokens.weight",),
    ),
    "an MLP": (
        scaled("model.layers.1.mlp.down_proj.weight", 1.001),
        {},
        "layer 1",
        "mlp",
        ("model.layers.1.mlp.down_proj.weight",),
    ),
    "final norm": (scaled("model.norm.weight", 1.001), {}, "final norm", None, ("model.norm.weight",)),
    "output layer": (scaled("lm_head.weight", 1.001), {}, "logits", None, ("lm_head.weight",)),
    "no number": (scaled("model.layers.3.mlp.up_proj.weight", math.nan), {}, "layer 3", "mlp", None),
}


def test_a_difference_against_another_folder_is_placed(llama, tmp_path):
    jobs = [{"hf": str(llama), "against": str(llama), "device": "cpu", **SPLIT}]
    for name, (change, config, *_) in DIFFERENCES.items():
        other = changed(llama, tmp_path / name.replace(" ", "_"), change or (lambda tensors: None), **config)
        # the one or the other is the changed one
        pair = {"hf": str(llama), "against": other} if len(jobs) % 2 else {"hf": other, "against": str(llama)}
        jobs.append({**pair, "device": "cpu", **(SPLIT if len(jobs) % 3 else STAGES)})
    same, *reports = run_distributed(run_jobs, 2, jobs)[0]
    assert same["equal"] and same["stages"][0]["stage"] == "embedding"  # one folder: its weights need no line
    for (name, (_, _, stage, part, tensors)), report in zip(DIFFERENCES.items(), reports, strict=True):
        first = report["first"]
        assert not report["equal"] and (first["stage"], first["part"]) == (stage, part), (name, first)
        if tensors:
            assert first["tensor"] in tensors and first["tensor_by"] == "weights", (name, first)
            assert report["stages"][0]["tensor"] in tensors, name
        before = report["stages"][1 : [line["stage"] for line in report["stages"]].index(stage)]
        assert all(line["equal"] for line in before), name
        assert stage in verdict_of(report) and verdict_of(report).startswith("DIFFERS"), name
    assert json.loads(json.dumps(reports, allow_nan=False)) == reports


def run_with_defects(folder: str) -> dict[str, dict]:
    """A report for each defect of Megatron's side alone."""
    from primus_bridge.conversion.hf_weights import HFWeights
    from primus_bridge.megatron import norm, rotary
    from primus_bridge.verify.run import verify

    options = Options(folder, device="cpu", tensor_model_parallel_size=2, sequence_parallel=True)
    read, frequencies, init = HFWeights.read, rotary.inverse_frequencies, norm.RMSNorm.__init__

    def exchanged(self, name, rows=None, columns=None):
        # only where the model is: the gradients lie in a folder of that name
        if self.folder.name != "gradients":
            name = {Q: K, K: Q}.get(name, name)
        return read(self, name, rows, columns)

    def base(rope, seq_len=0):
        inverse, factor = frequencies(rope, seq_len)
        return inverse * 1.01, factor

    def unmarked(self, *args, **options):
        init(self, *args, **options)
        self.weight.sequence_parallel = False  # Megatron then does not sum its gradient over the ranks

    reports = {}
    for name, owner, attribute, defect in (
        ("rule", HFWeights, "read", exchanged),
        ("rope", rotary, "inverse_frequencies", base),
        ("gradient", norm.RMSNorm, "__init__", unmarked),
    ):
        with mock.patch.object(owner, attribute, defect):
            reports[name] = verify(options).to_json()
    return reports


def test_a_defect_of_our_side_is_placed(llama):
    reports = run_distributed(run_with_defects, 2, str(llama))[0]
    first = reports["rule"]["first"]
    assert (first["stage"], first["part"]) == ("layer 2", "attention")
    assert first["tensor"] in (Q, K) and first["tensor_by"] == "gradient"
    assert reports["rope"]["first"]["stage"] == "layer 0" and reports["rope"]["first"]["part"] == "attention"
    # the forward pass is right: the last layer is the first that the backward pass reaches
    first = reports["gradient"]["first"]
    assert first["stage"] == "gradients of final norm" and first["tensor"] == "model.norm.weight"
    assert [line["stage"] for line in reports["gradient"]["stages"] if not line["equal"]] == ["gradients"]


def test_windows_and_original_contexts_are_reached():
    from primus_bridge.conversion.families import families
    from primus_bridge.verify.plan import _reach

    for name, reach in (("mistral-7b-v0.1", 4096), ("llama-3.1-8b", 8192), ("qwen3-8b", 0), ("phi-3.5-mini", 262144)):
        config = RELEASED[name]
        assert _reach(families()[config["model_type"]].architecture(config)) == reach, name


def test_random_tokens_leave_the_padding_alone():
    from primus_bridge.verify.batch import random_batch

    batch = random_batch(50, rows=4, length=32, seed=3, pad_token=7)
    assert torch.equal(batch["tokens"], random_batch(50, rows=4, length=32, seed=3, pad_token=7)["tokens"])
    lengths = (batch["tokens"] != 7).sum(1)
    assert lengths[0] == 32 and (lengths[1:] < 32).any() and lengths.min() >= 16
    for row, length in enumerate(lengths.tolist()):
        assert (batch["tokens"][row, length:] == 7).all() and batch["loss_mask"][row, length:].sum() == 0
        assert batch["loss_mask"][row, 0] == 0 and 0 < batch["loss_mask"][row].sum() < length
        assert torch.equal(batch["tokens"][row, 1:length], batch["labels"][row, : length - 1])
