"""What to do with a run next: the commands that load, serve, export or continue it, ready to paste."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from primus_bridge.report.collect import Report
from primus_bridge.report.notes import RUN_FILE, read_object

WIDTH = 72
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""


@dataclass(frozen=True)
class Snippet:
    title: str
    language: str
    """shell or Python."""
    code: str


def snippets(report: Report) -> list[Snippet]:
    """For the last export; and how to go on, or to export, where that is not done."""
    found = _of_export(report.exports[-1]) if report.exports else []
    if report.outcome != "finished":
        code = shell("primus", "train", "--config", report.folder / RUN_FILE, "--save", report.folder)
        go_on = f"Go on from step {report.checkpoints[-1].manifest.step:,}" if report.checkpoints else "Start it again"
        found.append(Snippet(f"{go_on}, in the folder in which it was started", "shell", code))
    if not report.exports and report.checkpoints:
        words: list[str | Path] = ["--load", report.folder, "--convert_to_hf", "--hf_save_path", report.folder / "hf"]
        code = shell("primus", "convert", "--framework", "megatron_bridge", *words)
        found.append(Snippet("Export the newest checkpoint to Hugging Face's format", "shell", code))
    return found


def shell(*words: str | Path) -> str:
    """The words as a shell reads them; a long line goes on below, an option a line."""
    quoted = [shlex.quote(str(word)) for word in words]
    if len(" ".join(quoted)) <= WIDTH:
        return " ".join(quoted)
    return "".join((" \\\n    " if word.startswith("--") else " ") + word for word in quoted).lstrip()


def _of_export(folder: Path) -> list[Snippet]:
    adapter = read_object(folder / "adapter_config.json")
    merged = folder / "merged"
    if adapter is None:
        return [_load(folder, "Load it"), _serve(folder)]
    base = str(adapter.get("base_model_name_or_path"))
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})"
    )
    found = [Snippet("Load the adapter over its base", "Python", code)]
    if not adapter.get("use_dora"):  # which vLLM does not know
        rank = max([adapter.get("r") or 1, *(adapter.get("rank_pattern") or {}).values()])
        most = next((size for size in VLLM_RANKS if size >= rank), rank)
        words = ["--enable-lora", "--max-lora-rank", str(most), "--lora-modules", f"adapter={folder}"]
        found.append(Snippet("Serve both with vLLM", "shell", shell("vllm", "serve", base, *words)))
    if merged.is_dir():
        found += [_load(merged, "Load the merged model"), _serve(merged)]
    return found


def _load(folder: Path, title: str) -> Snippet:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"
    )
    return Snippet(title, "Python", code)


def _serve(folder: Path) -> Snippet:
    return Snippet("Serve it with vLLM", "shell", shell("vllm", "serve", folder))
