"""Tokens per second and peak memory of this loop and of TRL's SFTTrainer, side by side in one run on one machine.

    pip install -e '.[bench]'
    python tests/benchmarks/sft_throughput.py                          # a 48 M Llama; on two cores about 20 minutes
    python tests/benchmarks/sft_throughput.py --repeats 1 --rows lora  # shorter
    python tests/benchmarks/sft_throughput.py --shape 8b               # one large GPU: random weights, nothing fetched

Equal on both sides: the model folder (random bf16 weights, a byte-level BPE trained on the rows on the spot), the rows
in file order, the alpaca prompt, loss on completions and their EOS, micro and global batch, the longest sample, bf16
compute with fp32 master weights of whatever trains (TRL: an fp32 model under autocast), AdamW at a constant rate,
clipping at 1, no activation recompute, PyTorch's own number of threads. Token ids, loss masks and the number of
trainable parameters are compared; the losses are printed. Otherwise each side runs by its defaults: TRL without
packing; ours through the SFT trainer that ``primus train`` runs, checkpoints left out.

Rows of the table: ``full`` trains all weights. ``lora`` trains adapters (rank 16) on all linear projections over a
frozen base, which TRL holds in fp32 here and ours in bf16; ``lora-bf16`` is the same with TRL's base in bf16 too.

Each side of each row runs in a process of its own, ours and TRL in turn; the median of --repeats counts. A step lasts
from the end of the step before to its own end (data, logging and callbacks included); the first ones are dropped.
Tokens are those of the samples, padding not counted. Peak memory is the process's largest resident memory up to the
end of the last step ("above start": less what was resident before the model was built); on a GPU it is
torch.cuda.max_memory_allocated. The model goes to a temporary folder (TMPDIR; 16 GB for 8b).

Nothing here asserts a time: other load on the machine changes the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "50m": dict(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    ),
    "8b": dict(  # Llama-3.1-8B
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}
# the child processes; torch is imported there only: Linux hands a parent's peak resident memory down to its children
CELLS = Path(__file__).with_name("sft_cells.py")
ROWS = ("full", "lora", "lora-bf16")
SIDES = ("ours", "TRL")


def default_data() -> Path | None:
    """alpaca_en_demo.json of LLaMA-Factory (999 rows) in the folder ``shared`` beside the checkout, if it is there."""
    path = Path(__file__).resolve().parents[3] / "shared/data/alpaca_en_demo.json"
    return path if path.is_file() else None


def run_cell(job: dict[str, Any]) -> dict[str, Any]:
    """The cell's result, or {'failed': why}. Its output goes to a file in the job's folder."""
    place = Path(job["folder"]) / "cells" / str(job["number"])
    place.mkdir(parents=True)
    job = job | {"out": str(place / "out"), "result": str(place / "result.json")}
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "PRIMUS_BRIDGE_CACHE": str(Path(job["folder"]) / "cache"),
        "HF_DATASETS_CACHE": str(Path(job["folder"]) / "datasets"),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    log = place / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(
            [sys.executable, str(CELLS), json.dumps(job)], stdout=stream, stderr=stream, env=environment
        ).returncode
    if code == 0:
        return json.loads(Path(job["result"]).read_text(encoding="utf-8"))
    text = log.read_text(encoding="utf-8", errors="replace")
    if "OutOfMemoryError" in text or "out of memory" in text:
        return {"failed": "out of memory"}
    print(f"{job['side']} {job['row']} failed:\n{text[-6000:]}", file=sys.stderr)
    # the kernel kills what asks for more memory than there is, but so may a person
    return {"failed": "killed (memory?)" if code == -signal.SIGKILL else f"exit code {code}"}


def check_equal(row: str, ours: dict[str, Any], trl: dict[str, Any]) -> None:
    """The two sides of a pair trained the same parameters on the same samples."""
    for what in ("digest", "tokens", "trainable", "threads"):
        if ours[what] != trl[what]:
            raise SystemExit(f"{row}: the sides differ in {what}: ours {ours[what]}, TRL {trl[what]}")


def tokens_per_second(run: dict[str, Any], skip: int) -> float:
    return sum(run["tokens"][skip:]) / sum(run["seconds"][skip:])


def summarise(pairs: list[dict[str, Any]], skip: int) -> dict[str, Any]:
    """Medians of each side over the pairs that ran, and the ratios of each pair."""
    out: dict[str, Any] = {}
    for side in SIDES:
        runs = [pair[side] for pair in pairs if "failed" not in pair[side]]
        if not runs:
            out[side] = {"failed": pairs[0][side]["failed"]}
            continue
        for run in runs:
            run["tokens_per_second"] = tokens_per_second(run, skip)
        out[side] = {
            "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
            "peak": statistics.median(run["peak"] for run in runs),
            "above_start": statistics.median(run["peak"] - run["before"] for run in runs),
            "first_loss": runs[0]["losses"][0],
            "last_loss": runs[0]["losses"][-1],
            "trainable": runs[0]["trainable"],
        }
    whole = [pair for pair in pairs if all("failed" not in pair[side] for side in SIDES)]
    out["ratios"] = [pair["ours"]["tokens_per_second"] / pair["TRL"]["tokens_per_second"] for pair in whole]
    return out


def print_table(summaries: dict[str, dict[str, Any]], lines: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("training")
    table.add_column("side")
    names = ("tokens/s", "ours / TRL", "peak MiB", "above start", "first loss", "last loss")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    mib = 2**20
    for row, summary in summaries.items():
        for side in SIDES:
            values, ratio = summary[side], ""
            if side == "ours":
                label = f"{row}, {values['trainable'] / 1e6:.1f} M" if "trainable" in values else row
            else:
                label = ""
                if ratios := summary["ratios"]:
                    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            if "failed" in values:
                table.add_row(label, side, values["failed"], ratio)
                continue
            table.add_row(
                label,
                side,
                f"{values['tokens_per_second']:,.0f}",
                ratio,
                f"{values['peak'] / mib:,.0f}",
                f"{values['above_start'] / mib:,.0f}",
                f"{values['first_loss']:.4f}",
                f"{values['last_loss']:.4f}",
            )
        table.add_section()
    # a pipe is not cut to 80 columns
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(*lines, sep="\n", soft_wrap=True)
    console.print(table)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "megatron-core", "transformers", "trl", "peft")}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="50m", help="the Llama's shape")
    add("--layers", type=int, help="fewer layers than the shape has (so that full fine-tuning of 8b fits)")
    add("--data", type=Path, default=default_data(), help="alpaca rows, JSON or JSONL; without any, written ones")
    add("--join", type=int, default=1, help="make one long sample of this many rows")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table")
    add("--steps", type=int, default=12, help="optimizer steps of a run")
    add("--skip", type=int, default=2, help="first steps that are not counted")
    add("--repeats", type=int, default=3, help="runs of each side")
    add("--micro-batch-size", type=int, default=4)
    add("--global-batch-size", type=int, default=16)
    add("--seq-length", type=int, help="longest sample; default 1024, for 8b 2048")
    add("--lr", type=float, default=1e-4)
    add("--recompute", action="store_true", help="full activation recompute on both sides")
    add("--json", type=Path, help="write settings, every run and the summary there")
    options = parser.parse_args(words)
    options.seq_length = options.seq_length or (2048 if options.shape == "8b" else 1024)
    if not 0 < options.skip < options.steps:
        parser.error("--skip must be above 0 and below --steps")
    if options.global_batch_size % options.micro_batch_size:
        parser.error("--global-batch-size must be a multiple of --micro-batch-size")
    return options


def main(words: list[str]) -> int:
    options = parse(words)
    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    names = ("join", "steps", "skip", "micro_batch_size", "global_batch_size", "seq_length", "lr", "recompute")
    settings = {name: getattr(options, name) for name in names} | {
        "shape": shape,
        "data": str(options.data.resolve()) if options.data else None,
    }
    # a terminated run takes its cell and its folder with it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="sft_throughput-") as folder:
        common = settings | {"folder": folder}
        made = run_cell(common | {"side": "prepare", "row": "", "number": 0})
        if "failed" in made:
            return 1
        runs: dict[str, list[dict[str, Any]]] = {row: [] for row in options.rows}
        number = 0
        for repeat in range(options.repeats):
            for row in options.rows:
                pair = {}
                for side in SIDES:
                    if repeat and runs[row][0][side].get("failed") == "out of memory":
                        pair[side] = runs[row][0][side]  # once is always
                        continue
                    number += 1
                    pair[side] = run_cell(common | {"side": side, "row": row, "number": number})
                    says = pair[side].get("failed") or f"{tokens_per_second(pair[side], options.skip):,.0f} tokens/s"
                    print(f"{repeat + 1}/{options.repeats} {row} {side}: {says}", file=sys.stderr, flush=True)
                if all("failed" not in pair[side] for side in SIDES):
                    check_equal(row, pair["ours"], pair["TRL"])
                runs[row].append(pair)
    summaries = {row: summarise(pairs, options.skip) for row, pairs in runs.items()}
    done = [pair[side] for pairs in runs.values() for pair in pairs for side in SIDES if "failed" not in pair[side]]
    tokens = sum(done[0]["tokens"]) if done else 0
    used = options.steps * options.global_batch_size
    machine = made["gpu"] or f"{processor()}, {made['threads']} threads"
    lines = [
        f"machine  {machine}; load before {load:.1f}",
        "with     " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"model    Llama, {made['parameters'] / 1e6:,.1f} M parameters, {shape['num_hidden_layers']} layers; "
        "bf16 compute, fp32 master weights" + (", activation recompute" if options.recompute else ""),
        f"data     {used} samples of {options.data.name if options.data else 'written rows'}, "
        f"{tokens / used:.0f} tokens on average, none above {options.seq_length}",
        f"runs     median of {options.repeats}; {options.steps} steps, the first {options.skip} not counted, of "
        f"{options.global_batch_size} samples in micro-batches of {options.micro_batch_size}",
    ]
    print_table(summaries, lines)
    if options.json:
        record = {
            "machine": machine,
            "load": load,
            "versions": versions(),
            "settings": settings,
            "model": made,
            "summary": summaries,
            "runs": runs,
        }
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    broken = [s for summary in summaries.values() for side in SIDES if (s := summary[side].get("failed"))]
    return 1 if any(reason != "out of memory" for reason in broken) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
