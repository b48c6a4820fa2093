"""What the ranks of the conversion, LoRA and checkpoint tests do (module level, so that a rank can import it)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.hf_folder import asset_files
from tests.distributed.layouts import pad_batch, synthetic_rows


class Built:
    """A model of a Hugging Face folder on this rank's part of a layout, optionally with adapters and an optimizer."""

    def __init__(self, folder: str, arguments: BridgeArguments, optimizer: bool = True):
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
        if arguments.peft.scheme:
            from primus_bridge.peft.lora import add_lora

            self.lora = add_lora(self.chunks, arguments.peft, arch, arguments.rng.seed)
        if optimizer:
            self.wrapped = wrap_data_parallel(self.chunks, arguments)
            self.optimizer = build_optimizer(self.wrapped, arguments)
            self.scheduler = build_scheduler(self.optimizer, arguments)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        from primus_bridge.megatron.names import global_parameters

        return global_parameters(self.chunks)

    def steps(self, first: int, last: int, global_batch: int = 8, micro_batch: int = 1) -> list[dict]:
        """Train steps first..last-1 on the synthetic rows; (loss, grad norm, ...) of each."""
        from primus_bridge.megatron.step import train_step
        from primus_bridge.objectives.supervised import supervised

        rows = synthetic_rows(self.model.architecture.vocab_size, global_batch * last)
        results = []
        for step in range(first, last):
            batch = rows[step * global_batch : (step + 1) * global_batch]
            mine = batch[self.parallel.dp_rank :: self.parallel.dp_size]
            micro = [pad_batch(mine[i : i + micro_batch], 24) for i in range(0, len(mine), micro_batch)]
            result = train_step(self.wrapped, self.optimizer, self.scheduler, micro, supervised, self.parallel)
            results.append(asdict(result))
        return results

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


def round_trip(jobs: list[tuple[str, BridgeArguments, str, int]]) -> None:
    """For each (folder, arguments, target, max_shard_bytes): load at the layout and export it again."""
    from primus_bridge.conversion.export import ExportOptions, export_model

    for folder, arguments, target, max_shard_bytes in jobs:
        built = Built(folder, arguments, optimizer=False)
        export_model(
            built.parameters(),
            built.model.family,
            built.model.architecture,
            built.parallel,
            Path(target),
            ExportOptions(asset_files(Path(folder)), built.model.weights().dtype, max_shard_bytes),
        )
        built.close()


def train_and_export_lora(folder: str, runs: list[tuple[BridgeArguments, str]], steps: int) -> list[list[dict]]:
    """Train adapters at each layout; export them to target/adapter and merged to target/merged."""
    from primus_bridge.conversion.adapters import export_adapter
    from primus_bridge.conversion.export import ExportOptions, export_model
    from primus_bridge.peft.merge import MergedParameters

    out = []
    for arguments, target in runs:
        built = Built(folder, arguments)
        out.append(built.steps(0, steps))
        model, parallel = built.model, built.parallel
        options = ExportOptions(asset_files(Path(folder)), torch.float32, 10**9)
        export_adapter(built.chunks, arguments.peft, model, parallel, Path(target) / "adapter", options, base=folder)
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


def train_and_save(folder: str, arguments: BridgeArguments, save: str, first: int, last: int, load: str | None) -> dict:
    """Continue ``load`` (when given) or start, train steps first..last-1, save the checkpoint of ``last``."""
    from primus_bridge.checkpoint.coordinator import load_run, save_run
    from primus_bridge.checkpoint.manifest import Manifest, find

    built = Built(folder, arguments)
    parallel = built.parallel
    if load is not None:
        found = find(Path(load))
        assert found.manifest.step == first
        load_run(found, built.wrapped, built.optimizer, built.scheduler, parallel.layout, arguments.rng.seed)
    results = built.steps(first, last)
    manifest = Manifest(
        step=last,
        contents="adapter" if built.lora else "model",
        training_state=True,
        params_dtype="float32",
        model_type=built.model.architecture.model_type,
        layout=parallel.layout,
    )
    save_run(
        Path(save),
        manifest,
        built.wrapped,
        built.optimizer,
        built.scheduler,
        assets=asset_files(Path(folder)),
        config=built.model.architecture.hf_config,
        save_total_limit=None,
    )
    weights = {name: parameter.detach().clone() for name, parameter in built.parameters().items()}
    random_numbers = torch.rand(4)
    built.close()
    return {"steps": results, "weights": weights, "random": random_numbers}


def save_and_resume(folder: str, jobs: list[tuple[BridgeArguments, str, int, int, str | None]]) -> list[dict]:
    """``train_and_save`` for each (arguments, save, first, last, load), in the same ranks."""
    return [train_and_save(folder, *job) for job in jobs]
