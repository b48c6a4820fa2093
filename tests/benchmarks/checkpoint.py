"""Checkpoints beside a plain copy of the same bytes, and how long training stands still for one.

    pip install -e '.[dev]'
    python tests/benchmarks/checkpoint.py                      # 220 M parameters, 3 GB, 1 and 2 ranks; 12 GB of disk
    python tests/benchmarks/checkpoint.py --ranks 1 --layers 2 --repeats 1

A Llama of random weights trains on real ranks (gloo, one thread each; --device cuda: a GPU each), bf16 with the
distributed optimizer or --precision fp32. A repeat does all of this once, one after the other, on the same disk
(--folder, TMPDIR); medians count, and ratios are of the same repeat. Seconds are from all ranks ready to the last done.

copy, dd        the checkpoint's files, one process: shutil.copyfile and fsync; dd bs=64M conv=fsync of those over 1 MiB
save            synchronous: training stands still until it is committed, checksums and fsync included
save, async     asynchronous: from its begin until it is committed, while training goes on
read            dd bs=64M of=/dev/null of them
load            model and optimizer from the checkpoint; with checksums: as a run does it, each file verified before
                these three with the files in the page cache, and once more after they were dropped from it (cold)

The pause is what the training loop waits: for an asynchronous save the begin (the copy to host memory) and the finish
(the commit) together. Step times are of the same training step without a save and while one is being written. Extra
memory is a rank's largest resident memory above that before. The first asynchronous save allocates the host copy that
later ones use again; it is named apart.

Nothing here asserts a time: other load on the machine changes the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Optional

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for the tests' parts, and in the ranks for this file

from tests.benchmarks.conversion import Phase, write_model  # noqa: E402

STEPS = 3
"""Timed training steps before each repeat's saves."""


def llama(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


# --- the plain copies


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, target: Path) -> None:
    for number, path in enumerate(_files(source)):
        copied = target / str(number)
        shutil.copyfile(path, copied)
        descriptor = os.open(copied, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _shards(folder: Path) -> list[Path]:
    """All but a hundredth of a percent of the bytes, without a process for each small file."""
    return [path for path in _files(folder) if path.stat().st_size > 2**20]


def _dd(source: Path, target: Path) -> None:
    for number, path in enumerate(_shards(source)):
        subprocess.run(
            ["dd", f"if={path}", f"of={target / str(number)}", "bs=64M", "conv=fsync", "status=none"], check=True
        )


def _read(source: Path) -> None:
    for path in _shards(source):
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=64M", "status=none"], check=True)


def _forget(folder: Path) -> None:
    """Drop the folder's files, which are on the disk, from the page cache."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _cached(folder: Path) -> float:
    """The part of the folder's bytes that the page cache holds; NaN where nothing says it."""
    if shutil.which("fincore") is None:
        return float("nan")
    words = ["fincore", "--bytes", "--noheadings", "--output", "RES,SIZE", *map(str, _files(folder))]
    lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    resident, sizes = zip(*(map(int, line.split()) for line in lines), strict=True)
    return sum(resident) / sum(sizes)


# --- in the ranks


def measure(model: str, work: str, precision: str, repeats: int, device: Optional[str]) -> list[dict[str, Any]]:
    """Run by every rank: what each repeat took here."""
    import torch.distributed as dist

    from primus_bridge.checkpoint.coordinator import Assets, SaveOptions
    from primus_bridge.checkpoint.integrity import find_whole
    from primus_bridge.checkpoint.manifest import Checkpoint, Manifest, find, iteration_folder
    from primus_bridge.conversion.hf_folder import asset_files
    from primus_bridge.launch.environment import choose_device
    from tests.distributed.layouts import arguments_for
    from tests.distributed.rank_functions import Built

    choose_device(device)
    arguments = arguments_for(optimizer={"lr": 1e-5}, train={"train_iters": 100_000}, mixed_precision=precision)
    built = Built(model, arguments)
    world, lead = dist.get_world_size(), dist.get_rank() == 0
    save = Path(work) / "save"
    coordinator = built.coordinator(str(save))
    assets = Assets(asset_files(Path(model)), built.model.architecture.hf_config)
    step = 0

    def train() -> float:
        """Seconds of one step."""
        nonlocal step
        began = time.perf_counter()
        built.steps(step, step + 1, global_batch=2 * world, micro_batch=1)
        step += 1
        return time.perf_counter() - began

    def begin() -> None:
        manifest = Manifest(
            step=step,
            contents="model",
            training_state=True,
            params_dtype="bfloat16" if precision == "bf16_mixed" else "float32",
            model_type="llama",
            layout=built.parallel.layout,
        )
        coordinator.begin(manifest, assets)

    def by_lead(work: Callable[[], None]) -> float:
        """Seconds of what rank 0 does alone."""
        dist.barrier()
        began = time.perf_counter()
        if lead:
            work()
        dist.barrier()
        return time.perf_counter() - began

    def copied(how: Callable[[Path, Path], None], source: Path) -> float:
        target = Path(work) / "copy"
        if lead:
            target.mkdir()
        seconds = by_lead(lambda: how(source, target))
        by_lead(lambda: shutil.rmtree(target))
        by_lead(os.sync)
        return seconds

    def phase(work: Callable[[], Any]) -> dict[str, float]:
        """Seconds, and peak memory above what was resident before."""
        before = _resident()
        with Phase() as timed:
            work()
        return {"seconds": timed.seconds, "extra": timed.peak - before}

    def asynchronous() -> dict[str, float]:
        coordinator.options = SaveOptions(asynchronous=True)
        before, meanwhile = _resident(), []
        with Phase() as whole:
            began = time.perf_counter()
            begin()
            paused = time.perf_counter() - began
            while _anywhere(coordinator.writing):
                meanwhile.append(train())
            began = time.perf_counter()
            coordinator.finish()
            finishing = time.perf_counter() - began
        coordinator.options = SaveOptions()
        return {
            "seconds": whole.seconds,
            "begin": paused,
            "finish": finishing,
            "step": statistics.median(meanwhile) if meanwhile else float("nan"),
            "steps": len(meanwhile),
            "extra": whole.peak - before,
        }

    def synchronous() -> None:
        begin()
        coordinator.finish()

    def loading(checkpoint: Checkpoint) -> dict[str, Any]:
        def load(verify: bool) -> None:
            found = find_whole(checkpoint.folder, verify)
            coordinator.load(found, built.parallel.layout)

        found = {
            "read": by_lead(lambda: _read(checkpoint.folder)),
            "load": phase(lambda: load(False)),
            "load with checksums": phase(lambda: load(True)),
        }
        for name, work in (
            ("read, cold", lambda: _read(checkpoint.folder)),
            ("load, cold", lambda: load(False)),
            ("load with checksums, cold", lambda: load(True)),
        ):
            by_lead(lambda: _forget(checkpoint.folder))
            found["still cached"] = _cached(checkpoint.folder) if lead else 0.0
            found[name] = by_lead(work) if name == "read, cold" else phase(work)
        return found

    train()  # the optimizer's state is made by the first step
    results = []
    for _ in range(repeats):
        one: dict[str, Any] = {"step": statistics.median(train() for _ in range(STEPS))}
        by_lead(os.sync)
        one["save"] = phase(synchronous)
        checkpoint = find(iteration_folder(save, step))
        one["bytes"] = sum(path.stat().st_size for path in _files(checkpoint.folder))
        one["copy"] = copied(_copy, checkpoint.folder)
        one["dd"] = copied(_dd, checkpoint.folder)
        one |= loading(checkpoint)
        by_lead(lambda: shutil.rmtree(save))
        by_lead(os.sync)
        one["save, async"] = asynchronous()
        by_lead(lambda: shutil.rmtree(save))
        results.append(one)
    built.close()
    return results


def _resident() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) * 1024


def _anywhere(mine: bool) -> bool:
    """Whether it holds on any rank. Collective."""
    import torch
    import torch.distributed as dist

    from primus_bridge.megatron.parallel import device

    flag = torch.tensor([int(mine)], device=device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


# --- the table


def slowest(ranks: list[Any]) -> Any:
    """The largest of each number over ranks."""
    if isinstance(ranks[0], dict):
        return {key: slowest([rank[key] for rank in ranks]) for key in ranks[0]}
    return max(ranks)


def _seconds(one: dict[str, Any], phase: str) -> float:
    return one[phase]["seconds"] if isinstance(one[phase], dict) else one[phase]


PLAIN = {"copy": "copy", "dd": "copy", "save": "copy", "save, async": "copy"} | {
    name + cold: "read" + cold for cold in ("", ", cold") for name in ("read", "load", "load with checksums")
}
"""Each phase and the plain work that it is compared with."""


def rows(ranks: int, repeats: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """ranks, phase, seconds, GB/s, ratio to the plain work, extra MiB a rank."""
    table = []
    for phase, plain in PLAIN.items():
        seconds = statistics.median(_seconds(one, phase) for one in repeats)
        rate = statistics.median(one["bytes"] / _seconds(one, phase) for one in repeats) / 1e9
        ratios = [_seconds(one, plain) / _seconds(one, phase) for one in repeats]
        ratio = f"{statistics.median(ratios):.2f}"
        if len(ratios) > 1:
            ratio += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        extra = ""
        if isinstance(repeats[0][phase], dict):
            extra = f"{max(one[phase]['extra'] for one in repeats) / 2**20:,.0f}"
        compared = "" if phase == plain else f"{ratio} of {plain}"
        table.append((str(ranks), phase, f"{seconds:.2f}", f"{rate:.3f}", compared, extra))
    return table


def pauses(repeats: list[dict[str, Any]]) -> list[str]:
    """What the training loop sees of a save, in words; of the asynchronous ones after the first, where there are."""
    pause = [one["save, async"]["begin"] + one["save, async"]["finish"] for one in repeats]
    later = slice(1, None) if len(repeats) > 1 else slice(None)
    shares = [100 * mine / one["save"]["seconds"] for mine, one in zip(pause, repeats, strict=True)][later]

    def median(*keys: str) -> float:
        return statistics.median(one[keys[0]][keys[1]] if len(keys) > 1 else one[keys[0]] for one in repeats[later])

    return [
        f"pause: synchronous {median('save', 'seconds'):.2f} s; asynchronous {statistics.median(pause[later]):.2f} s "
        f"(begin {median('save, async', 'begin'):.2f}, finish {median('save, async', 'finish'):.2f}), "
        f"{statistics.median(shares):.1f} % of it ({min(shares):.1f} to {max(shares):.1f}); the first {pause[0]:.2f} s",
        f"a training step: {median('step'):.2f} s alone, {median('save, async', 'step'):.2f} s while a save is written "
        f"({median('save, async', 'steps'):.0f} steps)",
    ]


def parse(words: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2], help="data-parallel ranks, one measurement each")
    add("--layers", type=int, default=12)
    add("--hidden", type=int, default=1024, help="hidden size, a multiple of 64")
    add("--precision", choices=("fp32", "bf16_mixed"), default="bf16_mixed")
    add("--repeats", type=int, default=5)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--folder", type=Path, help="where the files go: the disk that is measured; default TMPDIR")
    add("--json", type=Path, help="write every number here")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from tests.distributed.harness import run_distributed

    options = parse(words)
    load = os.getloadavg()[0]
    measured: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as name:
        work = Path(name)
        parameters = write_model(work / "model", llama(options.layers, options.hidden)) // 2
        for ranks in options.ranks:
            arguments = (str(work / "model"), name, options.precision, options.repeats, options.device)
            results = run_distributed(measure, ranks, *arguments, timeout=3600)
            measured[ranks] = [slowest(list(one)) for one in zip(*results, strict=True)]
            print(f"measured {ranks} of {options.ranks} ranks", file=sys.stderr, flush=True)
    # a pipe is not cut to 80 columns
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table()
    for heading in ("ranks", "phase"):
        table.add_column(heading)
    for heading in ("seconds", "GB/s", "speed beside the plain one", "extra MiB a rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    lines = [
        f"machine  {os.cpu_count()} cores; load before {load:.1f}",
        f"model    Llama, {parameters / 1e6:.0f} M parameters, {options.precision}, distributed optimizer",
        f"runs     median of {options.repeats}",
    ]
    for ranks, repeats in measured.items():
        for row in rows(ranks, repeats):
            table.add_row(*row)
        table.add_section()
        cached = max(one["still cached"] for one in repeats)
        lines.append(
            f"{ranks} rank{'s' if ranks > 1 else ''}   checkpoint of {repeats[0]['bytes'] / 1e9:.2f} GB; "
            f"cold: {100 * cached:.0f} % of it was still in the page cache"
        )
        lines += [f"         {line}" for line in pauses(repeats)]
    console.print(*lines, sep="\n", soft_wrap=True)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"parameters": parameters, "ranks": measured}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
