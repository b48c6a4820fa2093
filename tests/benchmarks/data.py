"""What data preparation and packing bring, beside TRL, in one run on one machine.

    pip install -e '.[bench]'
    python tests/benchmarks/data.py                    # on two cores about 15 minutes
    python tests/benchmarks/data.py --only prepare     # the first table, 5 minutes
    python tests/benchmarks/data.py --only train --repeats 1

prepare: alpaca-like rows (--rows, 50,000 written ones) become packed samples with a loss mask: ours is what a run does
before its first step (read the file, convert, render, tokenise, mask, pack, write the cache, which is new each time);
TRL's is ``SFTTrainer._prepare_dataset`` with packing on the same prompts and completions, already in memory, in a new
cache. Each in a process of its own, by turns; imports are not counted. TRL by its default (one process), and with
dataset_num_proc as many as there are cores. Both must give as many samples, tokens and supervised tokens.

train: supervised tokens per second of a 48 M Llama, bf16 compute with fp32 master weights, on real rows: TRL by its
default (padded to the longest of a batch, no packing), ours padded to the longest of a batch, and ours packed. A batch
is one micro-batch of --batch samples (packed: sequences of --seq-length tokens holding about as many tokens), so
"the batch's longest" is the longest of those samples. Supervised tokens are counted alike: answers and their EOS.

Nothing here asserts a time: other load on the machine changes the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def child(kind: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What this script does in a process of its own: ``prepare`` one side, with new caches."""
    place = Path(tempfile.mkdtemp(dir=folder))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PRIMUS_BRIDGE_CACHE": str(place / "cache"),
        "HF_DATASETS_CACHE": str(place / "datasets"),
    }
    result = place / "result.json"
    words = [sys.executable, __file__, "--child", kind, "--job", json.dumps(job | {"result": str(result)})]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return json.loads(result.read_text())


def write_rows(job: dict[str, Any]) -> dict[str, Any]:
    """rows.jsonl and a tokenizer trained on some of them, into the job's folder."""
    sys.path.insert(0, str(HERE))
    import sft_cells

    rows = sft_cells.written_rows(job["rows"])
    folder = Path(job["folder"])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sft_cells.train_tokenizer(rows[:2000]).save_pretrained(folder / "tokenizer")
    return {"characters": sum(len("".join(row.values())) for row in rows)}


def prepare_ours(job: dict[str, Any]) -> dict[str, Any]:
    from primus_bridge.config.arguments import BridgeArguments
    from primus_bridge.data.dataset import build_datasets
    from primus_bridge.data.tokenizer import load_tokenizer

    folder = Path(job["folder"])
    arguments = BridgeArguments(stage="sft")
    arguments.dataset.data_path = str(folder / "rows.jsonl")
    arguments.dataset.packed_sequence = True
    arguments.dataset.truncation = "right"
    arguments.model.seq_length = job["seq_length"]
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    started = time.perf_counter()
    bundle = build_datasets(arguments, tokenizer)
    seconds = time.perf_counter() - started
    sequences = bundle.ledger.sequences
    return {
        "seconds": seconds,
        "samples": bundle.ledger.train.samples,
        "tokens": bundle.ledger.train.tokens,
        "supervised": bundle.ledger.train.supervised,
        "sequences": sequences.count,
        "efficiency": sequences.efficiency,
    }


def prepare_trl(job: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, str(HERE))
    import sft_cells
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    folder = Path(job["folder"])
    rows = sft_cells.read_rows(folder / "rows.jsonl")
    pairs = [{"prompt": sft_cells.prompt(row), "completion": row["output"]} for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=job["seq_length"],
        packing=True,
        completion_only_loss=True,
        dataset_num_proc=job["num_proc"],
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(pairs[:8]), processing_class=tokenizer
    )
    dataset = Dataset.from_list(pairs)
    started = time.perf_counter()
    packed = trainer._prepare_dataset(dataset, tokenizer, config, True, None, "train")
    seconds = time.perf_counter() - started
    labels = packed["labels"] if "labels" in packed.column_names else None
    tokens = sum(len(ids) for ids in packed["input_ids"])
    return {
        "seconds": seconds,
        "samples": len(rows),
        "tokens": tokens,
        "supervised": sum(label != -100 for row in labels for label in row) if labels is not None else None,
        "sequences": len(packed),
        "efficiency": tokens / (len(packed) * job["seq_length"]),
    }


def prepare(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    job = {"folder": str(folder), "rows": options.rows, "seq_length": 2048}
    child("rows", job, folder)
    cores = os.cpu_count() or 1
    sides = {
        "ours": ("ours", job),
        "TRL": ("TRL", job | {"num_proc": None}),
        f"TRL, {cores} processes": ("TRL", job | {"num_proc": cores}),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        for name, (kind, asked) in sides.items():
            runs[name].append(child(kind, asked, folder))
            print(f"prepare {repeat + 1}/{options.repeats} {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    for what in ("samples", "tokens", "supervised"):
        if len({result[what] for results in runs.values() for result in results}) > 1:
            raise SystemExit(f"the sides differ in {what}")
    rows = []
    for name, results in runs.items():
        rate = [result["samples"] / result["seconds"] for result in results]
        ratios = [their["seconds"] / ours["seconds"] for ours, their in zip(runs["ours"], results, strict=True)]
        rows.append(
            {
                "side": name,
                "samples/s": statistics.median(rate),
                "ours is faster by": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                **{key: results[0][key] for key in ("samples", "tokens", "supervised", "sequences", "efficiency")},
            }
        )
    return rows


def train(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    sys.path.insert(0, str(HERE))
    from sft_throughput import SHAPES, run_cell

    data = options.data
    common = {
        "folder": str(folder),
        "data": str(data) if data else None,
        "shape": SHAPES["50m"],
        "join": 1,
        "lr": 1e-4,
        "recompute": False,
        "row": "full",
        "skip": options.skip,
        "seq_length": options.seq_length,
        "steps": options.steps,
        "micro_batch_size": options.batch,
        "global_batch_size": options.batch,
        "number": 0,
    }
    made = run_cell(common | {"side": "prepare"})
    if "failed" in made:
        raise SystemExit("the model could not be written")
    # packs of about as many tokens as a batch holds
    packs = {"packed": True, "micro_batch_size": options.packs, "global_batch_size": options.packs}
    sides = {"ours, packed": ("ours", packs), "ours, padded": ("ours", {}), "TRL": ("TRL", {})}
    runs: dict[str, list[float]] = {name: [] for name in sides}
    details: dict[str, dict[str, Any]] = {}
    number = 0
    for repeat in range(options.repeats):
        for name, (side, changed) in sides.items():
            number += 1
            result = run_cell(common | changed | {"side": side, "number": number})
            if "failed" in result:
                raise SystemExit(f"{name} failed")
            counted = slice(options.skip, None)
            seconds = sum(result["seconds"][counted])
            rate = sum(result["supervised"][counted]) / seconds
            runs[name].append(rate)
            details[name] = {
                "tokens/s": sum(result["tokens"][counted]) / seconds,
                "steps": len(result["seconds"]),
                "tokens a step": statistics.mean(result["tokens"][counted]),
                "first loss": result["losses"][0],
            }
            print(
                f"train {repeat + 1}/{options.repeats} {name}: {rate:,.0f} supervised tokens/s",
                file=sys.stderr,
                flush=True,
            )
    rows = []
    for name, rates in runs.items():
        ratios = [packed / other for packed, other in zip(runs["ours, packed"], rates, strict=True)]
        rows.append(
            {
                "side": name,
                "supervised tokens/s": statistics.median(rates),
                "packed is faster by": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                **details[name],
            }
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        cells = []
        for name, value in row.items():
            if name == "efficiency":
                cells.append(f"{value:.2%}")
            elif isinstance(value, float):
                cells.append(f"{value:,.2f}" if value < 100 else f"{value:,.0f}")
            else:
                cells.append("" if value is None else f"{value:,}" if isinstance(value, int) else str(value))
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(table)


def main(words: list[str]) -> int:
    sys.path.insert(0, str(HERE))
    from sft_throughput import default_data

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=("prepare", "train"))
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=default_data(), help="alpaca rows; without any, written ones")
    parser.add_argument("--batch", type=int, default=8, help="samples of an unpacked step")
    parser.add_argument("--packs", type=int, default=1, help="sequences of a packed step")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("rows", "ours", "TRL"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.child:
        job = json.loads(options.job)
        work = {"rows": write_rows, "ours": prepare_ours, "TRL": prepare_trl}[options.child]
        Path(job["result"]).write_text(json.dumps(work(job)))
        return 0
    tables = {}
    with tempfile.TemporaryDirectory(prefix="data-benchmark-") as folder:
        if options.only != "train":
            tables["prepare"] = prepare(options, Path(folder))
            show(f"{options.rows:,} rows -> packed samples with a loss mask", tables["prepare"])
    with tempfile.TemporaryDirectory(prefix="data-benchmark-") as folder:
        if options.only != "prepare":
            tables["train"] = train(options, Path(folder))
            show("SFT, supervised tokens per second", tables["train"])
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
