"""The quickstart: model and data made here, trained through ``primus train``'s own road, exported, asked again."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
from primus_bridge.errors import ConfigError
from primus_bridge.files import check_writable, write_json, write_text, writing
from primus_bridge.quickstart import data

TRAIN_ITERS = 900
GOAL = 0.9
"""Exact match that a full-length run must reach on the held-out questions."""
CONFIG = "quickstart.yaml"
RESULT = "quickstart.json"
LEAVES = (
    "data",
    "model",
    "hf",
    "iter_*",
    "latest_*",
    "tensorboard",
    METRICS_FILE,
    "ledger.json",
    "run.yaml",
    "loss.png",
    "report.html",
    "events.jsonl",
    "environment.json",
    RESULT,
)
"""What a quickstart leaves in its folder, and the next one there replaces; a user's own files stay."""

YAML = """\
# Written by `primus quickstart`; run it again, or change it:
#   primus train --framework megatron_bridge --config {save}/quickstart.yaml --save other_folder
framework: megatron_bridge
stage: sft
convert_from_hf: true
hf_model_name_or_path: "{save}/model"
convert_to_hf: true

training:
  micro_batch_size: {micro_batch_size}
  global_batch_size: 48
  train_iters: {train_iters}
  eval_interval: {eval_interval}
  seq_length: 64
  lr: 2.0e-3
  min_lr: 0.0
  lr_warmup_iters: {warmup}
  adam_beta2: 0.95
  precision: fp32 # at this size faster than bf16_mixed, on any processor
  seed: {seed}

logger:
  log_interval: 10

data:
  data_path: "{save}/data/train.json"
  validation_data_path: "{save}/data/heldout.json"
  dataset_format: alpaca
  prompt_template: alpaca

parallelism:
  tensor_model_parallel_size: {tensor}

checkpointing:
  save: "{save}"

dist:
  nproc: {nproc}
  device: cpu
"""


@dataclass(frozen=True)
class Options:
    """save: the folder; train_iters None: the full length, whose answers are judged."""

    save: Path
    seed: int = 1
    train_iters: int | None = None
    nproc: int = 2
    judge: bool = True


def prepare_folder(save: Path) -> None:
    """Make the folder; an earlier quickstart's files in it go. Raises ConfigError when it holds something else."""
    check_writable(save, "the quickstart folder")
    if save.is_dir() and any(save.iterdir()):
        if not (save / CONFIG).is_file():
            raise ConfigError(
                "is not empty and holds no earlier quickstart; give another --save, or empty it", where=str(save)
            )
        for path in (path for pattern in LEAVES for path in save.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    save.mkdir(parents=True, exist_ok=True)


def run(options: Options) -> int:
    """The whole; 0, or 1 when a full-length run answers too few questions."""
    import transformers

    from primus_bridge.cli.train import train
    from primus_bridge.config import load_arguments
    from primus_bridge.quickstart.evaluate import evaluate
    from primus_bridge.quickstart.model import build

    transformers.utils.logging.disable_progress_bar()  # its bars of a tiny model are noise between ours
    started = time.perf_counter()
    save = options.save
    iters = options.train_iters or TRAIN_ITERS
    tensor = min(options.nproc, 2)  # more ranks are data parallel
    with writing("the quickstart", save):
        prepare_folder(save)
        # first of all: it marks the folder as ours, should the rest be interrupted
        text = YAML.format(
            save=json.dumps(str(save))[1:-1],
            train_iters=iters,
            eval_interval=max(iters // 6, 1),
            warmup=min(100, iters // 9),
            seed=options.seed,
            nproc=options.nproc,
            tensor=tensor,
            micro_batch_size=48 // (options.nproc // tensor),
        )
        write_text(save / CONFIG, text)
        _, heldout = data.write(save / "data", options.seed)
        train_questions, heldout_questions = data.questions(options.seed)
        size = build(save / "model", train_questions, options.seed)
    print(
        f"made      {save}/model: a Llama of {size / 1e6:.1f} M parameters and its tokenizer\n"
        f"made      {save}/data: {len(train_questions):,} questions with answers, "
        f"{len(heldout_questions)} held out ({', '.join(data.SKILLS)})",
        flush=True,
    )
    before = evaluate(save / "model", heldout)
    print(f"before    {before.exact_match:.1%} of the held-out questions answered right\n", flush=True)
    code = train(load_arguments(str(save / CONFIG), []))
    if code:
        return code
    after = evaluate(save / "hf", heldout)
    steps = [line for line in read_history(save / METRICS_FILE) if "loss" in line]
    settled = steps[len(steps) // 2 :]
    result = {
        "exact_match_before": before.exact_match,
        "exact_match_after": after.exact_match,
        "by_skill": after.by_skill(),
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_per_second": round(sum(line["tokens_per_second"] for line in settled) / len(settled), 1),
        "hf_folder": str(save / "hf"),
    }
    write_json(save / RESULT, result)
    _report(before, after, result, save)
    judged = options.judge and options.train_iters is None
    if judged and after.exact_match < GOAL:
        print(f"\nquickstart: {after.exact_match:.1%} is under the {GOAL:.0%} that a full run should reach")
        return 1
    return 0


def _report(before, after, result: dict, save: Path) -> None:
    print("\nheld-out questions, answered by the export in transformers")
    for skill in data.SKILLS:
        index = next(i for i, row in enumerate(after.rows) if row["skill"] == skill)
        row = after.rows[index]
        question = f"{row['instruction']} {row['input']}".strip()
        print(f"  {question:<46} {_shown(before.answers[index]):<18} -> {_shown(after.answers[index])}")
    print(f"\n{'exact match':<14}{'before':>9}{'after':>9}")
    skills_before, skills_after = before.by_skill(), after.by_skill()
    for skill in data.SKILLS:
        print(f"  {skill:<12}{skills_before[skill]:>9.0%}{skills_after[skill]:>9.0%}")
    print(f"  {'all':<12}{before.exact_match:>9.1%}{after.exact_match:>9.1%}")
    print(
        f"\n{result['seconds']:.0f} seconds, {result['tokens_per_second']:,.0f} tokens per second\n"
        f"the model: {result['hf_folder']}\n"
        f"next:      primus train --framework megatron_bridge --config {save / CONFIG} --save other_folder"
    )


def _shown(answer: str) -> str:
    text = json.dumps(answer, ensure_ascii=False)
    return text if len(text) <= 18 else text[:14] + '..."'
