"""RunResult: what a run hands back: its losses, how far it came, and where everything is."""

from __future__ import annotations

from pathlib import Path

from primus_bridge.callbacks.base import RunState
from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
from primus_bridge.callbacks.summary import RunSummary, summarise
from primus_bridge.checkpoint.manifest import best, committed
from primus_bridge.report.notes import REPORT_FILE


class RunResult(RunSummary):
    """The run's summary (train_loss, eval_loss, best_eval_loss, best_step) and:

    steps, and step: optimizer steps done, those before a resume included. tokens (without padding) and seconds (of the
    loop) are of this process. nonfinite_steps and rollbacks: see train.on_nonfinite. stop_reason: why it ended before
    its last step. Folders and files are None where there
    are none: checkpoint (the newest), best_checkpoint (of CheckpointCallback), hf_folder (the export: the model, or the
    adapter of a LoRA run), adapter_folder (the same, of a LoRA run), merged_folder, report.
    """

    step: int
    steps: int
    tokens: int
    seconds: float
    nonfinite_steps: int
    rollbacks: int
    stop_reason: str | None
    save_folder: str
    checkpoint: str | None
    best_checkpoint: str | None
    hf_folder: str | None
    adapter_folder: str | None
    merged_folder: str | None
    report: str | None


def run_result(state: RunState, seconds: float, exported: Path | None) -> RunResult:
    """Read from the save folder. exported: the folder that convert_to_hf has written, when it has."""
    arguments = state.arguments
    save = arguments.save_folder
    lora = exported is not None and arguments.peft.scheme is not None
    merged = lora and arguments.checkpoint.save_merged_model
    checkpoints, report = committed(save), save / REPORT_FILE
    return {
        **summarise(read_history(save / METRICS_FILE)),
        "step": state.step,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": seconds,
        "nonfinite_steps": state.nonfinite_steps,
        "rollbacks": state.rollbacks,
        "stop_reason": state.stop_reason,
        "save_folder": str(save),
        "checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "best_checkpoint": _text(best(save)),
        "hf_folder": _text(exported),
        "adapter_folder": str(exported) if lora else None,
        "merged_folder": str(exported / "merged") if exported is not None and merged else None,
        "report": str(report) if report.is_file() else None,
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
