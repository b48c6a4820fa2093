"""Bytes per second of Hugging Face -> Megatron ranks and back, beside a plain copy of the same files in the same run.

    pip install -e '.[dev]'
    python tests/benchmarks/conversion.py                      # a 2 GB Llama on 2 ranks; several minutes, 8 GB of disk
    python tests/benchmarks/conversion.py --tp 2 --pp 2        # four ranks
    python tests/benchmarks/conversion.py --size 0.05 --repeats 1

The model is a random bf16 Llama in safetensors of about 500 MB, written to a temporary folder (--folder, TMPDIR). Its
files are in the page cache of every side. Rows of the table, each from all ranks ready to the last rank done:

copy    shutil.copyfile of each file and fsync, one process
load    load_weights: the folder's tensors into the parameters of models that are built and empty; nothing is written
import  ``convert`` into a checkpoint, with everything it does: models built, weights loaded, checkpoint written
export  export_model: the ranks' parameters to a folder of such files, fsync included; it is compared with the source

The ranks are real (gloo, one thread each, started anew each repeat). GB/s is of the model's tensors; the ratio to the
copy is of the same repeat, and medians count. Peak memory is the largest resident memory of any rank during the phase
alone (VmHWM, reset before it), interpreter and libraries included, beside 1.2 x the largest shard + 1 GiB.

Nothing here asserts a time: other load on the machine changes the numbers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for tests.distributed.harness, and in the ranks for this file

SHARD_BYTES = 500 * 10**6
PHASES = ("load", "import", "export")


# --- the model


def llama(size_gb: float, stages: int) -> dict[str, Any]:
    """config.json of a Llama with about this many gigabytes of bf16 tensors and a multiple of ``stages`` layers."""
    hidden, intermediate, heads = (2048, 5632, 16) if size_gb >= 0.5 else (256, 704, 4)
    vocabulary = 32000
    layer = 2 * (3 * hidden * intermediate + 3 * hidden * hidden)  # q and o whole, k and v half each
    count = (size_gb * 1e9 - 4 * vocabulary * hidden) / layer
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": stages * max(1, round(count / stages)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_model(folder: Path, config: dict[str, Any]) -> int:
    """Write config.json and safetensors with random values; the bytes of all tensors."""
    import torch

    from primus_bridge.conversion.hf_weights import INDEX
    from primus_bridge.conversion.model_folder import HFModel
    from primus_bridge.conversion.rules import expected_hf_tensors
    from primus_bridge.conversion.safetensors_file import SafetensorsFile
    from primus_bridge.files import write_json

    folder.mkdir()
    write_json(folder / "config.json", config)
    model = HFModel.at(folder, str(folder))
    shards: list[dict[str, Any]] = [{}]
    filled = total = 0
    for name, shape in expected_hf_tensors(model.family.rules, model.architecture).items():
        size = 2 * int(torch.Size(shape).numel())
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = (torch.bfloat16, shape)
        filled, total = filled + size, total + size
    torch.manual_seed(0)
    weight_map = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(entries, name))
        with SafetensorsFile.create(folder / name, entries) as file:
            for tensor, (dtype, shape) in entries.items():
                file.write(tensor, torch.empty(shape).normal_(std=0.02).to(dtype))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def check_same(source: Path, export: Path) -> None:
    import torch

    from primus_bridge.conversion.hf_weights import HFWeights

    first, second = HFWeights(source), HFWeights(export)
    if set(first.tensors) != set(second.tensors):
        raise SystemExit(f"the export has other tensors: {sorted(set(first.tensors) ^ set(second.tensors))[:5]}")
    for name in first.tensors:
        if not torch.equal(first.read(name).view(torch.int16), second.read(name).view(torch.int16)):
            raise SystemExit(f"the export differs from the source in {name}")


# --- what is measured


class Phase:
    """Seconds from all ranks ready to this rank done, and this rank's peak resident memory in between."""

    def __enter__(self) -> Phase:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self.start
        status = Path("/proc/self/status").read_text().splitlines()
        self.peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

    @property
    def result(self) -> dict[str, float]:
        return {"seconds": self.seconds, "peak": self.peak}


def _arguments(tp: int, pp: int):
    from primus_bridge.config.arguments import BridgeArguments

    arguments = BridgeArguments()
    arguments.model.tensor_model_parallel_size = tp
    arguments.model.pipeline_model_parallel_size = pp
    return arguments


def load_and_export(folder: str, target: str, tp: int, pp: int) -> dict[str, Any]:
    """Run by every rank."""
    import torch

    from primus_bridge.conversion.export import ExportOptions, export_model
    from primus_bridge.conversion.load import load_weights
    from primus_bridge.conversion.model_folder import HFModel
    from primus_bridge.launch.environment import choose_device
    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.megatron.model import build_model
    from primus_bridge.megatron.names import global_parameters

    choose_device("cpu")
    arguments = _arguments(tp, pp)
    parallel = parallel_module.initialize(arguments)
    model = HFModel.open(folder, weights=True)
    chunks = build_model(model.architecture, arguments, parallel, dtype=torch.bfloat16)
    parameters = global_parameters(chunks)
    with Phase() as load:
        load_weights(parameters, model.weights(), model.family, model.architecture, parallel.shards)
    with Phase() as export:
        options = ExportOptions([], torch.bfloat16, SHARD_BYTES)
        export_model(parameters, model.family, model.architecture, parallel, Path(target), options)
    shard = sum(parameter.nbytes for parameter in parameters.values())
    parallel_module.finalize()
    return {"load": load.result, "export": export.result, "shard": shard}


def import_checkpoint(folder: str, save: str, tp: int, pp: int) -> dict[str, Any]:
    """Run by every rank."""
    from primus_bridge.conversion.convert import import_hf

    with Phase() as phase:
        layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        import_hf(folder, save, layout, device="cpu")
    return phase.result


def copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy that is on the disk when it is done."""
    target.mkdir()
    start = time.perf_counter()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def slowest(ranks: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(rank[key] for rank in ranks) for key in ("seconds", "peak")}


def measure(work: Path, source: Path, tp: int, pp: int) -> dict[str, Any]:
    """One repeat: seconds of the copy, seconds and peak memory of each phase, the largest shard's bytes."""
    from tests.distributed.harness import run_distributed

    copied, exported, saved = work / "copied", work / "exported", work / "saved"
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:  # into the page cache, if it has left it
            while file.read(2**24):
                pass
    os.sync()
    result: dict[str, Any] = {"copy": copy(source, copied)}
    shutil.rmtree(copied)
    os.sync()
    ranks = run_distributed(load_and_export, tp * pp, str(source), str(exported), tp, pp, timeout=3600)
    result["shard"] = max(rank["shard"] for rank in ranks)
    result |= {phase: slowest([rank[phase] for rank in ranks]) for phase in ("load", "export")}
    check_same(source, exported)
    shutil.rmtree(exported)
    os.sync()
    result["import"] = slowest(
        run_distributed(import_checkpoint, tp * pp, str(source), str(saved), tp, pp, timeout=3600)
    )
    shutil.rmtree(saved)
    return result


def rows(repeats: list[dict[str, Any]], size: int) -> Iterator[tuple[str, ...]]:
    """The table, as text: what, seconds, GB/s, ratio to the copy, peak MiB, limit MiB."""

    def rate(seconds: list[float]) -> tuple[str, str]:
        median = statistics.median(seconds)
        return f"{median:.2f}", f"{size / median / 1e9:.3f}"

    yield ("copy", *rate([one["copy"] for one in repeats]), "", "", "")
    limit = 1.2 * max(one["shard"] for one in repeats) + 2**30
    for phase in PHASES:
        ratios = [one["copy"] / one[phase]["seconds"] for one in repeats]
        ratio = f"{statistics.median(ratios):.2f}"
        if len(ratios) > 1:
            ratio += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        peak = max(one[phase]["peak"] for one in repeats)
        yield (
            phase,
            *rate([one[phase]["seconds"] for one in repeats]),
            ratio,
            f"{peak / 2**20:,.0f}",
            f"{limit / 2**20:,.0f}",
        )


def print_table(lines: list[str], table_rows: Iterator[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("phase")
    for name in ("seconds", "GB/s", "copy's time / its", "peak MiB a rank", "1.2 x shard + 1 GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in table_rows:
        table.add_row(*row)
    # a pipe is not cut to 80 columns
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(*lines, sep="\n", soft_wrap=True)
    console.print(table)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=float, default=2.0, help="GB of the model's bf16 tensors")
    add("--tp", type=int, default=2, help="tensor-parallel size")
    add("--pp", type=int, default=1, help="pipeline-parallel size")
    add("--repeats", type=int, default=3)
    add("--folder", type=Path, help="where the files go: the disk that is measured; default TMPDIR")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=options.folder) as name:
        work = Path(name)
        config = llama(options.size, options.pp)
        size = write_model(work / "model", config)
        repeats = []
        for repeat in range(options.repeats):
            one = measure(work, work / "model", options.tp, options.pp)
            says = ", ".join(f"{phase} {one[phase]['seconds']:.2f} s" for phase in PHASES)
            print(f"{repeat + 1}/{options.repeats} copy {one['copy']:.2f} s, {says}", file=sys.stderr, flush=True)
            repeats.append(one)
        files = len(list((work / "model").glob("*.safetensors")))
    shard = max(one["shard"] for one in repeats)
    lines = [
        f"machine  {os.cpu_count()} cores; load before {load:.1f}",
        f"model    Llama, {size / 1e9:.2f} GB in bf16, {config['num_hidden_layers']} layers, {files} safetensors",
        f"ranks    tensor {options.tp} x pipeline {options.pp}; the largest shard {shard / 2**20:,.0f} MiB",
        f"runs     median of {options.repeats}; peak memory: the largest of them; every export equal to its source",
    ]
    print_table(lines, rows(repeats, size))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
