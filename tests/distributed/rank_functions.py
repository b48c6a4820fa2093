"""What the ranks of the conversion, LoRA and checkpoint tests do (module level, so that a rank can import it)."""

from __future__ import annotations

import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.hf_folder import asset_files
from tests.distributed.layouts import make_batch, synthetic_rows


class Built:
    """A model of a Hugging Face folder on this rank's part of a layout, optionally with adapters and an optimizer.

    adapter: a PEFT folder whose adapters it has; else they are those of ``arguments.peft``, if any.
    """

    def __init__(self, folder: str, arguments: BridgeArguments, optimizer: bool = True, adapter: str | None = None):
        from primus_bridge.conversion.load import load_weights
        from primus_bridge.conversion.model_folder import HFModel
        from primus_bridge.megatron import parallel as parallel_module
        from primus_bridge.megatron.model import build_model
        from primus_bridge.megatron.names import global_parameters
        from primus_bridge.megatron.optimizer import build_optimizer, build_scheduler, wrap_data_parallel

        self.arguments = arguments
        self.parallel = parallel_module.initialize(arguments)
        self.model = HFModel.open(folder, weights=True)
        arch, family = self.model.architecture, self.model.family
        self.chunks = build_model(arch, arguments, self.parallel)
        load_weights(global_parameters(self.chunks), self.model.weights(), family, arch, self.parallel.shards)
        self.lora = None
        if adapter is not None:
            from primus_bridge.conversion.adapters import load_adapter
            from primus_bridge.conversion.peft_folder import PeftFolder
            from primus_bridge.peft.build import add_lora

            self.adapter = PeftFolder.open(adapter)
            self.plan = self.adapter.plan(self.model)
            arguments.peft = self.adapter.arguments(self.plan)
            self.lora = add_lora(self.chunks, arguments.peft, self.plan, seed=None)
            load_adapter(self.chunks, self.plan, self.adapter, self.parallel)
        elif arguments.peft.scheme:
            from primus_bridge.peft.build import add_lora
            from primus_bridge.peft.plan import adapter_plan

            self.plan = adapter_plan(arguments.peft, self.model)
            self.lora = add_lora(self.chunks, arguments.peft, self.plan, arguments.rng.seed)
        if optimizer:
            self.wrapped = wrap_data_parallel(self.chunks, arguments)
            self.optimizer = build_optimizer(self.wrapped, arguments)
            self.scheduler = build_scheduler(self.optimizer, arguments)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        from primus_bridge.megatron.names import global_parameters

        return global_parameters(self.chunks)

    def steps(self, first: int, last: int, global_batch: int = 8, micro_batch: int = 2) -> list[dict]:
        """Train steps first..last-1 on the synthetic rows; (loss, grad norm, ...) of each."""
        from primus_bridge.megatron.step import train_step
        from primus_bridge.objectives.supervised import supervised

        rows = synthetic_rows(self.model.architecture.vocab_size, global_batch * last)
        results = []
        for step in range(first, last):
            batch = rows[step * global_batch : (step + 1) * global_batch]
            mine = batch[self.parallel.dp_rank :: self.parallel.dp_size]
            packed, noise = self.arguments.dataset.packed_sequence, self.arguments.train.neftune_noise_alpha is not None
            micro = [make_batch(mine[i : i + micro_batch], 24, packed, noise) for i in range(0, len(mine), micro_batch)]
            result = train_step(self.wrapped, self.optimizer, self.scheduler, micro, supervised, self.parallel)
            results.append(asdict(result))
        return results

    def coordinator(self, save: str):
        """Of the state that a training run has, but for its place in the data."""
        from primus_bridge.checkpoint.components import SharingPattern, StateComponent
        from primus_bridge.checkpoint.coordinator import CheckpointCoordinator
        from primus_bridge.megatron.rng import RankRNG
        from primus_bridge.megatron.sharded_state import ModelState, OptimizerState

        torch_dist = {"format": "torch_dist"}
        model = ModelState(self.wrapped, trainable_only=self.lora is not None)
        optimizer, per_rank = OptimizerState(self.optimizer, model), SharingPattern.PER_RANK
        components = [
            StateComponent("model", model, SharingPattern.PER_GROUP, "dp_group", metadata=torch_dist),
            StateComponent("optimizer", optimizer, per_rank, metadata=torch_dist),
            StateComponent("scheduler", self.scheduler, SharingPattern.REPLICATED),
            StateComponent("rng", RankRNG(self.arguments.rng.seed), per_rank),
        ]
        return CheckpointCoordinator(Path(save), components, self.parallel.groups)

    def close(self) -> None:
        from primus_bridge.megatron.parallel import destroy_model_parallel

        destroy_model_parallel()


def train(folder: str, runs: list[tuple[BridgeArguments, int]], steps: int) -> list[list[dict]]:
    """For each (arguments, micro batch size), in the same ranks: the results of ``steps`` steps."""
    out = []
    for arguments, micro_batch in runs:
        built = Built(folder, arguments)
        out.append(built.steps(0, steps, micro_batch=micro_batch))
        built.close()
    return out


def losses_and_gradients(
    folder: str, arguments: BridgeArguments, variants: list[list[list[dict]]]
) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """For each variant, the micro-batches of every data-parallel rank: (loss, this rank's whole gradients by name)."""
    from primus_bridge.megatron.step import run_schedule
    from primus_bridge.objectives.supervised import supervised

    arguments.ddp.use_distributed_optimizer = False
    built = Built(folder, arguments)
    out = []
    for variant in variants:
        for chunk in built.wrapped:
            chunk.zero_grad_buffer()
        mine = variant[built.parallel.dp_rank]
        loss, count = run_schedule(built.wrapped, mine, supervised, built.parallel, forward_only=False)["loss"]
        trained = {name: p for name, p in built.parameters().items() if p.requires_grad}
        out.append((loss / count, {name: p.main_grad.clone() for name, p in trained.items()}))
    built.close()
    return out


def family_results(folder: str, layouts: list[BridgeArguments], target: str) -> list[Any]:
    """For each layout: (loss, gradient norm) of the first step, after the folder was exported again to
    target/number; or what was raised."""
    results: list[Any] = []
    for number, arguments in enumerate(layouts):
        try:
            built = Built(folder, arguments)
            export_again(built, folder, Path(target) / str(number), 10**9 if number % 2 == 0 else 20_000)
            step = built.steps(0, 1, micro_batch=4)[0]
            results.append((step["loss"], step["grad_norm"]))
            built.close()
        except Exception:
            results.append(traceback.format_exc())
            leave_model_parallel()
    return results


def leave_model_parallel() -> None:
    from primus_bridge.megatron.parallel import destroy_model_parallel

    destroy_model_parallel()


def export_again(built: Built, folder: str, target: Path, max_shard_bytes: int) -> None:
    """The model as it was loaded, in the dtypes of its folder."""
    from primus_bridge.conversion.export import ExportOptions, export_model
    from primus_bridge.conversion.load import folder_dtypes

    model = built.model
    params, others = folder_dtypes(model.weights(), model.family, model.architecture)
    options = ExportOptions(asset_files(Path(folder)), params, max_shard_bytes, others)
    export_model(built.parameters(), model.family, model.architecture, built.parallel, target, options)


def round_trip(jobs: list[tuple[str, BridgeArguments, str, int]]) -> None:
    """For each (folder, arguments, target, max_shard_bytes): load at the layout and export it again."""
    for folder, arguments, target, max_shard_bytes in jobs:
        built = Built(folder, arguments, optimizer=False)
        export_again(built, folder, Path(target), max_shard_bytes)
        built.close()


def train_and_export_lora(folder: str, runs: list[tuple[BridgeArguments, str]], steps: int) -> list[list[dict]]:
    """Train adapters at each layout; export them to target/adapter and merged to target/merged."""
    from primus_bridge.conversion.adapters import adapter_config, export_adapter
    from primus_bridge.conversion.export import ExportOptions, export_model
    from primus_bridge.peft.merge import MergedParameters

    out = []
    for arguments, target in runs:
        built = Built(folder, arguments)
        out.append(built.steps(0, steps))
        model, parallel = built.model, built.parallel
        options = ExportOptions(asset_files(Path(folder)), torch.float32, 10**9)
        config = adapter_config(built.plan, arguments.peft.dropout, folder)
        export_adapter(built.chunks, built.plan, parallel, Path(target) / "adapter", options, config)
        export_model(
            MergedParameters(built.chunks),
            model.family,
            model.architecture,
            parallel,
            Path(target) / "merged",
            options,
        )
        built.close()
    return out


def train_and_save(
    folder: str,
    arguments: BridgeArguments,
    save: str,
    first: int,
    last: int,
    load: str | None,
    adapter: str | None = None,
) -> dict:
    """Continue ``load`` (when given) or start, train steps first..last-1, save the checkpoint of ``last``."""
    from primus_bridge.checkpoint.coordinator import Assets
    from primus_bridge.checkpoint.manifest import Manifest, find

    built = Built(folder, arguments, adapter=adapter)
    parallel, coordinator = built.parallel, built.coordinator(save)
    if load is not None:
        found = find(Path(load))
        assert found.manifest.step == first
        coordinator.load(found, parallel.layout)
    results = built.steps(first, last)
    manifest = Manifest(
        step=last,
        contents="adapter" if built.lora else "model",
        training_state=True,
        params_dtype="float32",
        model_type=built.model.architecture.model_type,
        layout=parallel.layout,
    )
    coordinator.begin(manifest, Assets(asset_files(Path(folder)), built.model.architecture.hf_config))
    coordinator.finish()
    weights = {name: parameter.detach().clone() for name, parameter in built.parameters().items()}
    random_numbers = torch.rand(4)
    built.close()
    return {"steps": results, "weights": weights, "random": random_numbers}


def save_and_resume(
    folder: str, jobs: list[tuple[BridgeArguments, str, int, int, str | None]], adapter: str | None = None
) -> list[dict]:
    """``train_and_save`` for each (arguments, save, first, last, load), in the same ranks."""
    return [train_and_save(folder, *job, adapter) for job in jobs]
