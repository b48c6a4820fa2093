"""Bars count every value once; axes are round numbers; the SVG is well-formed."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from primus_bridge.preview.histogram import MOST_BARS, bins, histogram, round_step

RNG = np.random.default_rng(0)
VALUES = {
    "one": np.array([7]),
    "equal": np.full(50, 2048),
    "lengths": np.clip(RNG.lognormal(4.4, 0.7, 5000), 1, 2048).astype(np.int64),
    "zeros": np.zeros(3, dtype=np.int64),
    "large": RNG.integers(1, 10_000_000, 1000),
    "few": np.array([1, 2, 2, 3]),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_value_is_in_a_bar(name):
    values = VALUES[name]
    edges, counts = bins(values)
    assert counts.sum() == len(values) and len(counts) <= MOST_BARS
    assert edges[0] == 0 and edges[-1] > values.max()
    assert np.array_equal(edges, np.round(edges)) and len(edges) == len(counts) + 1
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        assert count == np.sum((values >= left) & (values < right))


def test_fractions_up_to_one_inclusive():
    edges, counts = bins(np.array([0.0, 0.5, 0.999, 1.0]), upper=1.0)
    assert edges[0] == 0 and edges[-1] == pytest.approx(1.0) and counts.sum() == 4 and counts[-1] == 2


@pytest.mark.parametrize("span, parts, step", [(2048, 24, 100), (20, 4, 5), (1, 24, 0.05), (5, 5, 1), (7, 4, 2)])
def test_round_step(span, parts, step):
    assert round_step(span, parts) == pytest.approx(step)


@pytest.mark.parametrize("name", VALUES)
def test_svg(name):
    values = VALUES[name]
    figure = ElementTree.fromstring(histogram(values, "Tokens <a> sample", "tokens & more"))
    svg = figure.find("svg")
    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-label"].startswith(f"Tokens <a> sample: {len(values):,} counted; median")
    told = [bar.find("title").text for bar in svg.iter("rect")]
    assert sum(int(text.rpartition(": ")[2].replace(",", "")) for text in told) == len(values)
    numbers = [float(bar.attrib[key]) for bar in svg.iter("rect") for key in ("x", "y", "width", "height")]
    assert min(numbers) > 0
    labels = [text.text for text in svg.iter("text")]
    assert "tokens & more" in labels and "0" in labels


def test_nothing_to_count():
    figure = histogram(np.zeros(0, dtype=np.int64), "Tokens", "tokens")
    assert "nothing to count" in figure and not re.search("<rect", figure)


def test_percent():
    figure = histogram(np.array([0.5, 1.0, 1.0]), "Fill", "used", percent=True)
    assert "median 100 %, mean 83.33 %, 50 % to 100 %" in figure and "95 % to 100 %: 2" in figure
