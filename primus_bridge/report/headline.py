"""The top of the report: what was trained, how it ended, the numbers that people ask for first."""

from __future__ import annotations

from html import escape

from primus_bridge.callbacks.summary import summarise
from primus_bridge.page.document import facts, text
from primus_bridge.peft.plan import describe
from primus_bridge.report.collect import Report
from primus_bridge.report.series import totals


def duration(seconds: float) -> str:
    """``48 s``, ``7 min 12 s``, ``3 h 05 min``, ``2 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(count: float) -> str:
    """Bytes as ``512 MiB`` or ``1.37 GiB``."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def model_name(report: Report) -> str:
    """The model that was trained: its hub id or folder, else what the checkpoint says it came from."""
    named = report.arguments.checkpoint.hf_model_name_or_path
    manifest = report.checkpoints[-1].manifest if report.checkpoints else None
    known = manifest and (manifest.base or manifest.model_type)
    return named or known or report.arguments.checkpoint.load or "a model"


def lead(report: Report) -> str:
    arguments = report.arguments
    kinds = {"sft": "Supervised fine-tuning", "pretrain": "Pretraining"}
    peft = arguments.peft
    # the targets stand among the arguments: here they would fill the line
    method = describe(peft).partition(" on ")[0] if peft.scheme else "all weights"
    ranks = f"{report.ranks} rank{'s' * (report.ranks > 1)}"
    return f"{kinds[arguments.stage]} of {model_name(report)}: {method}, {arguments.mixed_precision}, {ranks}."


def status(report: Report) -> str:
    """A line that says how the run ended; after a failure with the error."""
    step, last = report.step, report.sessions[-1].last if report.sessions else None
    where = f"step {step:,} of {report.train_iters:,}"
    detail = ""
    if report.outcome == "finished":
        words = f"Finished: {where}."
    elif report.outcome == "stopped":
        reason = (last or {}).get("reason")
        words = f"Stopped early at {where}" + (f": {reason}." if reason else ".")
    elif report.outcome == "failed":
        assert last is not None
        words = f"Failed after {where}: {last['message']}"
        if last.get("traceback"):
            detail = f"<details><summary>Traceback</summary><pre>{escape(last['traceback'])}</pre></details>"
    else:
        words = (
            f"Not finished when this page was written ({_when(report.written)}): {where}. The run was still going, or "
            "it was killed; primus report makes the page again."
        )
    return f'<div class="status {report.outcome}" role="status"><p>{text(words)}</p>{detail}</div>'


def _when(time: str) -> str:
    return f"{time[:10]} {time[11:16]} UTC"


def tiles(report: Report) -> str:
    """The facts of the run, and those of its losses."""
    total = totals(report.training, report.begun_at)
    rows = {"Steps": f"{report.step:,} of {report.train_iters:,}"}
    for key, name in (("nonfinite_steps", "Steps not finite"), ("rollbacks", "Rollbacks")):
        counts = report.training.numbers(key)
        if len(counts):
            rows[name] = f"{int(counts[-1]):,}"
    losses = report.training.numbers("loss")
    if len(losses):
        rows["Training loss"] = f"{losses[0]:.4f} to {losses[-1]:.4f}"
    last = next((line for line in reversed(report.history) if line.get("eval_loss") is not None), None)
    if last is not None:
        rows["Evaluation loss"] = f"{last['eval_loss']:.4f} at step {last['step']:,}"
    summary = summarise(report.history)
    if summary["best_step"] is not None:
        rows["Best evaluation loss"] = f"{summary['best_eval_loss']:.4f} at step {summary['best_step']:,}"
    if total.tokens:
        rows["Tokens"] = f"{total.tokens:,}"
    if report.ledger is not None and report.ledger.sequences.count and not report.ledger.streaming:
        rows["Epochs"] = f"{report.samples / report.ledger.sequences.count:.3g}"
    if report.sessions:
        wall = sum(session.seconds for session in report.sessions)
        starts = len(report.sessions)
        rows["Wall time"] = duration(wall) + (f" in {starts} starts" if starts > 1 else "")
    if total.seconds:
        rows["Time in steps"] = duration(total.seconds)
    return facts(rows)
