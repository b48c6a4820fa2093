"""A histogram as inline SVG: axes, gridlines, a count a bar; its colours are the page's."""

from __future__ import annotations

from html import escape

import numpy as np

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 14, 44
MOST_BARS = 24


def round_step(span: float, parts: int) -> float:
    """The least 1, 2 or 5 times a power of ten of which ``parts`` cover ``span``."""
    exact = max(span, 1e-12) / parts
    power = 10.0 ** np.floor(np.log10(exact))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= exact * (1 - 1e-9)))


def bins(values: np.ndarray, upper: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(edges float64 [n + 1], counts int64 [n]) from 0 to beyond the largest value, or to ``upper``, inclusive.

    Whole numbers get whole edges, and an edge belongs to the bar at its right.
    """
    whole = values.dtype.kind in "iu"
    largest = float(values.max(initial=0)) if upper is None else upper
    step = round_step(largest + whole, MOST_BARS)
    if whole:
        step = max(1.0, step)
    count = max(1, int(np.ceil((largest + whole) / step - 1e-9)))
    edges = np.arange(count + 1) * step
    return edges, np.histogram(values, edges)[0].astype(np.int64)


def histogram(values: np.ndarray, title: str, axis: str, percent: bool = False) -> str:
    """A ``<figure>``: the histogram of ``values`` (int, or float 0..1 with ``percent``) and its median, mean and range.

    title, axis: what is counted, and the label below the horizontal axis.
    """
    edges, counts = bins(values, 1.0 if percent else None)
    tallest = int(counts.max(initial=1)) or 1
    tick = max(1, round(round_step(tallest, 4)))
    top = -(-tallest // tick) * tick
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def number(value: float) -> str:
        return f"{100 * value:.4g} %" if percent else f"{value:,.0f}"

    def x(value: float) -> float:
        return LEFT + across * value / edges[-1]

    def y(count: float) -> float:
        return TOP + down * (1 - count / top)

    parts = []
    for count in range(0, top + 1, tick):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(count):.1f}" y2="{y(count):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(count) + 4:.1f}" text-anchor="end">{count:,}</text>')
    for left, right, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        if not count:
            continue
        # a bar of few among many stays visible
        height = max(1.5, down * count / top)
        until = number(right if percent else right - 1)
        span = number(left) if number(left) == until else f"{number(left)} to {until}"
        parts.append(
            f'<rect class="bar" x="{x(left) + 0.75:.2f}" width="{max(1, x(right) - x(left) - 1.5):.2f}" '
            f'y="{TOP + down - height:.2f}" height="{height:.2f}" rx="1.5"><title>{span}: {count:,}</title></rect>'
        )
    label_step = round_step(float(edges[-1]), 5)
    for value in np.arange(0, edges[-1] + label_step / 1e6, label_step).tolist():
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="label" x="{LEFT + across / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis)}</text>'
    )
    summary = _summary(values, number)
    name = escape(f"{title}: {len(values):,} counted; {summary}")
    return (
        f"<figure><figcaption><b>{escape(title)}</b><span>{escape(summary)}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'
    )


def _summary(values: np.ndarray, number) -> str:
    if not len(values):
        return "nothing to count"
    low, middle, high = values.min(), float(np.median(values)), values.max()
    return f"median {number(middle)}, mean {number(float(values.mean()))}, {number(low)} to {number(high)}"
