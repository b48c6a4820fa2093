"""The loss curve of a metrics.jsonl: as text for a terminal, and as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from primus_bridge.callbacks.metrics import METRICS_FILE, read_history

# braille cells are two dots wide and four high: bit of dot (column, row from the top)
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))

Points = tuple[list[int], list[float]]


def series(history: Sequence[dict[str, Any]], key: str) -> Points:
    """Steps and finite values of one key."""
    points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
    return [step for step, _ in points], [float(value) for _, value in points]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average, forward and backward averaged so that it does not lag behind a falling loss.

    ``span`` is its memory in points. Same length as ``values``.
    """
    forward, backward = _ema(values, span), _ema(values[::-1], span)[::-1]
    return [(left + right) / 2 for left, right in zip(forward, backward, strict=True)]


def _ema(values: Sequence[float], span: float) -> list[float]:
    decay = 1.0 - 1.0 / max(span, 1.0)
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)  # corrects the start's bias towards zero
        out.append(mean / weight)
    return out


def _resample(steps: Sequence[int], values: Sequence[float], columns: int) -> list[float]:
    """Linear interpolation at ``columns`` evenly spaced steps."""
    out, right = [], 1
    for column in range(columns):
        at = steps[0] + (steps[-1] - steps[0]) * column / max(columns - 1, 1)
        while right < len(steps) - 1 and steps[right] < at:
            right += 1
        left = right - 1
        share = min(1.0, (at - steps[left]) / max(steps[right] - steps[left], 1))
        out.append(values[left] + share * (values[right] - values[left]))
    return out


def terminal_curve(
    history: Sequence[dict[str, Any]], width: int = 72, height: int = 10, ascii_only: bool = False
) -> str:
    """The smoothed training loss as lines of text, ``width`` columns with its labels; empty under two points."""
    steps, losses = series(history, "loss")
    if len(steps) < 2:
        return ""
    losses = smooth(losses, len(losses) / 40)
    low, high = min(losses), max(losses)
    labels = [f"{high - (high - low) * row / (height - 1):.3g}" for row in range(height)]
    margin = max(map(len, labels)) + 1
    columns = max(width - margin - 2, 10)
    values = _resample(steps, losses, columns * 2)
    dots = height * 4
    rows = [round((high - value) / ((high - low) or 1.0) * (dots - 1)) for value in values]
    cells = [[0] * columns for _ in range(height)]
    for x, row in enumerate(rows):
        previous = rows[max(x - 1, 0)]
        # a steep line stays connected: fill half of the way from the previous dot
        for y in range(min(row, (row + previous) // 2), max(row, (row + previous + 1) // 2) + 1):
            cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    corner, bar, floor = ("+", "|", "-") if ascii_only else ("└", "┤", "─")
    lines = ["loss".rjust(margin)]
    for row, cell_row in enumerate(cells):
        text = "".join(
            ("*" if bits else " ") if ascii_only else chr(0x2800 + bits) if bits else " " for bits in cell_row
        )
        label = labels[row] if row % 3 == 0 or row == height - 1 else ""
        lines.append(f"{label:>{margin}} {bar}{text.rstrip()}")
    lines.append(" " * (margin + 1) + corner + floor * columns)
    first, last = str(steps[0]), str(steps[-1])
    lines.append(" " * (margin + 2) + first + "step".center(columns - len(first) - len(last)) + last)
    return "\n".join(lines)


def write_png(history: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> bool:
    """Training loss (thin), its smoothed line and evaluation points. False when there is nothing to draw.

    Raises ImportError without matplotlib, OSError when ``path`` cannot be written.
    """
    steps, losses = series(history, "loss")
    if not steps:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    # no pyplot: it keeps global state and looks for a display
    figure = Figure(figsize=(8.0, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ink, blue, orange = "#22303c", "#2a6fbb", "#e07a1f"
    smoothed = smooth(losses, len(losses) / 40)
    axes.plot(steps, losses, color=blue, alpha=0.30, linewidth=0.8, label="training loss")
    axes.plot(steps, smoothed, color=blue, linewidth=2.0, label="smoothed")
    eval_steps, eval_losses = series(history, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, color=orange, linewidth=1.2, alpha=0.6)
        axes.plot(
            eval_steps, eval_losses, "o", color=orange, markeredgecolor="white", markersize=6.5, label="evaluation"
        )
    positive = [value for value in losses + eval_losses if value > 0]
    if len(positive) == len(losses) + len(eval_losses) and max(positive) > 30 * min(smoothed):
        axes.set_yscale("log")  # a loss that falls by orders of magnitude would hug the axis
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.015)
    axes.set_xlabel("optimizer step", color=ink)
    axes.set_ylabel("loss per supervised token", color=ink)
    if title:
        axes.set_title(title, color=ink, loc="left", fontsize=12, fontweight="bold", pad=10)
    axes.grid(True, which="major", color="#d9e0e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=ink, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9aa7b2")
    axes.legend(frameon=False, labelcolor=ink, loc="upper right")
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def load(save_folder: str | Path) -> list[dict[str, Any]]:
    """The whole history of a save folder, earlier runs that were resumed included."""
    return read_history(Path(save_folder) / METRICS_FILE)
