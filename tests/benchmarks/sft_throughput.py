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
import hashlib
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# torch is imported in the cells only: Linux hands a parent's peak resident memory down to its children

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
TOKENIZER_VOCAB = 16384
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROWS = ("full", "lora", "lora-bf16")
SIDES = ("ours", "TRL")
LORA_RANK, LORA_ALPHA = 16, 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- the model, the tokenizer and the rows ---------------------------------------------------------------------------


def default_data() -> Path | None:
    """alpaca_en_demo.json of LLaMA-Factory (999 rows) in the folder ``shared`` beside the checkout, if it is there."""
    path = Path(__file__).resolve().parents[3] / "shared/data/alpaca_en_demo.json"
    return path if path.is_file() else None


def read_rows(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)


def written_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Alpaca-shaped rows of invented words, their lengths drawn from alpaca_en_demo's quantiles (characters)."""
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "en", "ar")]
    words = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(6000)})
    rng.shuffle(words)
    weights = [1 / (rank + 3) for rank in range(len(words))]  # Zipf's law

    def text(quantiles: tuple[int, ...]) -> str:
        place = rng.random() * (len(quantiles) - 1)
        low, high = quantiles[int(place)], quantiles[int(place) + 1]
        length = low + (place - int(place)) * (high - low)
        out: list[str] = []
        while sum(map(len, out)) + len(out) < length:
            out += [*rng.choices(words, weights, k=rng.randint(4, 12)), "."]
        return " ".join(out).replace(" .", ".")

    return [
        {
            "instruction": text((16, 38, 46, 56, 70, 88, 120)),
            "input": text((3, 11, 21, 36, 67, 123, 450)) if rng.random() < 0.41 else "",
            "output": text((1, 42, 107, 230, 465, 820, 1218, 1728, 2400)),
        }
        for _ in range(count)
    ]


def joined(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """Every ``count`` rows as one long row: their questions and answers as one answer."""
    out = []
    for start in range(0, len(rows) - count + 1, count):
        first, *rest = rows[start : start + count]
        parts = [first["output"], *(f"{row['instruction']}\n{row['output']}" for row in rest)]
        out.append({**first, "output": "\n\n".join(parts)})
    return out


def train_tokenizer(rows: list[dict[str, str]]):
    """A byte-level BPE of at most TOKENIZER_VOCAB tokens, which puts BOS before a text as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB,
        # a pair seen once is no token: the rows would become whole sentences
        min_frequency=2,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((prompt(row) + row["output"] for row in rows), trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def prompt(row: dict[str, str]) -> str:
    """The text before the answer, as prompt_template alpaca writes it (the cells compare the tokens)."""
    from primus_bridge.quickstart.model import prompt

    return prompt(row["instruction"], row["input"])


def write_model(folder: Path, tokenizer, shape: dict[str, Any]) -> int:
    """config.json, random bf16 weights (one tensor in memory at a time) and tokenizer; the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from primus_bridge.conversion.hf_folder import write_safetensors

    config = LlamaConfig(
        tie_word_embeddings=False,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **shape,
    )
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def tensors():
        for name, size in shapes.items():
            tensor = torch.ones(size) if name.endswith("norm.weight") else torch.randn(size, device=device) * 0.02
            yield name, tensor.to(torch.bfloat16)

    folder.mkdir()
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    entries = {name: (torch.bfloat16, size) for name, size in shapes.items()}
    write_safetensors(folder / "model.safetensors", entries, tensors())
    return sum(torch.Size(size).numel() for size in shapes.values())


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Write model/ and rows.json (the samples of the run, none longer than seq_length) into the job's folder."""
    folder = Path(job["folder"])
    rows = read_rows(Path(job["data"])) if job["data"] else written_rows(1000 * job["join"])
    # only the columns that both sides are given
    rows = [
        {key: row.get(key) or "" for key in ("instruction", "input", "output")} for row in joined(rows, job["join"])
    ]
    tokenizer = train_tokenizer(rows)
    lengths = [len(tokenizer(prompt(row) + row["output"]).input_ids) + 1 for row in rows]
    # the sides cut long samples from different ends: none is long enough to be cut
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= job["seq_length"]]
    assert fitting, f"no row has at most {job['seq_length']} tokens"
    needed = job["steps"] * job["global_batch_size"]
    chosen = (fitting * (needed // len(fitting) + 1))[:needed]
    (folder / "rows.json").write_text(json.dumps(chosen), encoding="utf-8")
    parameters = write_model(folder / "model", tokenizer, job["shape"])
    return {"parameters": parameters, "vocabulary": len(tokenizer), "read": len(rows), "fitting": len(fitting)}


# ---- one cell: one side of one row, in its own process ---------------------------------------------------------------


def memory_now() -> int:
    """Bytes held by this process: device memory on a GPU, else resident memory."""
    import psutil
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def memory_peak() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def digest(samples) -> str:
    """sha256 over (ids, which of them are targets) of all samples in order."""
    whole = hashlib.sha256()
    for ids, targets in samples:
        whole.update(repr((list(map(int, ids)), list(map(bool, targets)))).encode())
    return whole.hexdigest()


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    """The trainer that ``primus train`` runs, as the only rank of its job; times and losses from its metrics.jsonl."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
    from primus_bridge.config import load_arguments
    from primus_bridge.config.validate import validate
    from primus_bridge.registry import BackendRegistry

    folder = Path(job["folder"])
    options = {
        "checkpoint.hf_model_name_or_path": folder / "model",
        "checkpoint.convert_from_hf": "true",
        "checkpoint.save": job["out"],
        "dataset.data_path": folder / "rows.json",
        "dataset.prompt_template": "alpaca",
        "dataset.shuffle": "false",
        "model.seq_length": job["seq_length"],
        "train.micro_batch_size": job["micro_batch_size"],
        "train.global_batch_size": job["global_batch_size"],
        "train.train_iters": job["steps"],
        "optimizer.lr": job["lr"],
        "optimizer.weight_decay": 0.0,
        "scheduler.lr_decay_style": "constant",
        "mixed_precision": "bf16_mixed",
    }
    if job["recompute"]:
        options["model.recompute_granularity"] = "full"
    if job["row"] != "full":
        options |= {"peft.scheme": "lora", "peft.dim": LORA_RANK, "peft.alpha": LORA_ALPHA}
        options["peft.target_modules"] = ",".join(PROJECTIONS)
    arguments = load_arguments(None, [f"{key}={value}" for key, value in options.items()], "sft")
    validate(arguments)
    adapter = BackendRegistry.get_adapter(arguments.framework)
    adapter.prepare_backend(arguments)

    class Measured(adapter.load_trainer_class("sft")):
        """The trainer itself, with a look at memory before the model, and no checkpoint at the end."""

        def init(self):
            # what is imported counts as start, not as model
            from primus_bridge.megatron import loop, optimizer  # noqa: F401

            self.memory_before = memory_now()
            super().init()

        def save(self, step):
            return self.save_folder

    trainer = Measured(arguments, module_rank=0, module_world_size=1, module_master_port=port)
    trainer.run()
    history = read_history(Path(job["out"]) / METRICS_FILE)
    data = trainer.data.train
    return {
        "tokens": [entry["tokens"] for entry in history],
        "seconds": [entry["step_time"] for entry in history],
        "losses": [entry["loss"] for entry in history],
        "peak": history[-1]["memory"],
        "before": trainer.memory_before,
        "digest": digest(data[index] for index in range(len(data))),
        "trainable": sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters() if p.requires_grad),
    }


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer on the same folder and rows, as prompt and completion; times from a callback."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback  # noqa: F401
    from trl import SFTConfig, SFTTrainer

    class InFileOrder(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends: list[float] = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.ends.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available() and state.global_step in (job["skip"], job["steps"]):
                torch.cuda.synchronize()  # where the counted steps begin and end: the optimizer's kernels may still run
            self.ends.append(time.perf_counter())
            self.peak = memory_peak()

    folder = Path(job["folder"])
    rows = read_rows(folder / "rows.json")
    dataset = Dataset.from_list([{"prompt": prompt(row), "completion": row["output"]} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = SFTConfig(
        output_dir=job["out"],
        per_device_train_batch_size=job["micro_batch_size"],
        gradient_accumulation_steps=job["global_batch_size"] // job["micro_batch_size"],
        max_steps=job["steps"],
        max_length=job["seq_length"],
        completion_only_loss=True,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=job["recompute"],
        logging_steps=1,  # as ours
        save_strategy="no",
        report_to="none",
    )
    lora = None
    if job["row"] != "full":
        lora = LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            target_modules=list(PROJECTIONS),
            task_type="CAUSAL_LM",
        )
    before = memory_now()
    dtype = torch.bfloat16 if job["row"] == "lora-bf16" else torch.float32  # peft keeps the adapters in fp32 either way
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    clock = Clock()
    trainer = InFileOrder(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.train()
    samples = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in trainer.train_dataset]
    batch = job["global_batch_size"]
    return {
        "tokens": [sum(len(ids) for ids, _ in samples[i : i + batch]) for i in range(0, len(samples), batch)],
        "seconds": [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak": clock.peak,
        "before": before,
        "digest": digest(samples),
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def cell(job: dict[str, Any]) -> dict[str, Any]:
    """What a child process does."""
    import torch

    result = {"prepare": prepare, "ours": run_ours, "TRL": run_trl}[job["side"]](job)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return result | {"threads": torch.get_num_threads(), "gpu": gpu}


# ---- the parent: cells in turn, the table ----------------------------------------------------------------------------


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
            [sys.executable, __file__, "--cell", json.dumps(job)], stdout=stream, stderr=stream, env=environment
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
    add("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.seq_length = options.seq_length or (2048 if options.shape == "8b" else 1024)
    if not 0 < options.skip < options.steps:
        parser.error("--skip must be above 0 and below --steps")
    if options.global_batch_size % options.micro_batch_size:
        parser.error("--global-batch-size must be a multiple of --micro-batch-size")
    return options


def main(words: list[str]) -> int:
    options = parse(words)
    if options.cell:
        job = json.loads(options.cell)
        Path(job["result"]).write_text(json.dumps(cell(job)), encoding="utf-8")
        return 0
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
