"""The cells of sft_throughput.py: what its child processes do, one side of one row of the table each.

``python sft_cells.py JOB`` with the job as JSON; the result is written to the file that the job names.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

TOKENIZER_VOCAB = 16384
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
LORA_RANK, LORA_ALPHA = 16, 32
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- the model, the tokenizer and the rows ---------------------------------------------------------------------------


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

    from primus_bridge.conversion.safetensors_file import write_safetensors

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
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

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
    if job.get("packed"):
        options["dataset.packed_sequence"] = "true"
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
            self.trainable = sum(p.numel() for chunk in self.chunks for p in chunk.parameters() if p.requires_grad)

        def save(self, step, consumed_samples):
            return self.save_folder

    trainer = Measured(arguments, module_rank=0, module_world_size=1, module_master_port=0)
    trainer.run()
    history = read_history(Path(job["out"]) / METRICS_FILE)
    data = trainer.data.train
    return {
        "tokens": [entry["tokens"] for entry in history],
        "supervised": [entry["supervised_tokens"] for entry in history],
        "seconds": [entry["step_time"] for entry in history],
        "losses": [entry["loss"] for entry in history],
        "peak": history[-1]["memory"],
        "before": trainer.memory_before,
        "digest": digest(data[index] for index in range(len(data))),
        "trainable": trainer.trainable,
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
    batches = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    return {
        "tokens": [sum(len(ids) for ids, _ in rows) for rows in batches],
        "supervised": [sum(sum(targets) for _, targets in rows) for rows in batches],
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


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    Path(asked["result"]).write_text(json.dumps(cell(asked)), encoding="utf-8")
