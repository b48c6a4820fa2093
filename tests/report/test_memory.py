"""Memory by phase on the page, in a real browser: bars to scale beside their plan, every rank's numbers."""

from __future__ import annotations

import json

import pytest

from primus_bridge.errors import ConfigError
from primus_bridge.files import write_json
from primus_bridge.report.collect import collect
from primus_bridge.report.page import write_report
from tests.preview.browser import chromium, opened, worst_contrast
from tests.report.folders import line, save_folder, write_lines

GIB = 2**30


def of_rank(rank: int, stage: int, weights: int, host: int = 0) -> dict:
    parts = {"weights": weights * GIB, "gradients": GIB, "optimizer": 2 * GIB, "activations": GIB, "buffers": 0}
    return {"rank": rank, "stage": stage, **parts, "host": host, "total": (weights + 4) * GIB, "peak": 20 * GIB}


def write_memory(folder, ranks: list[dict]) -> None:
    parts = {"weights": 4 * GIB, "gradients": GIB, "optimizer": 2 * GIB, "activations": 3 * GIB}
    stages = [parts] * (1 + max(rank["stage"] for rank in ranks))
    found = {"unit": "bytes", "step": 20, "device": "gpu", "ranks": ranks}
    write_json(folder / "memory.json", {**found, "planned": {"length": 2048, "stages": stages}})


def test_bars_and_numbers_of_every_rank(tmp_path):
    folder = save_folder(tmp_path / "run")
    parts = ("weights", "gradients", "optimizer", "activations", "buffers")
    write_lines(folder, [line(step, **{f"memory_{part}": 1000 for part in parts}) for step in range(1, 21)])
    write_memory(folder, [of_rank(0, 0, 4), of_rank(1, 0, 3), of_rank(2, 1, 1), of_rank(3, 1, 1, host=GIB)])
    file = write_report(folder)
    with chromium() as browser, opened(browser, file) as page:
        for width, scheme in ((1280, "light"), (360, "light"), (360, "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            section = page.locator("section[aria-labelledby=memory]")
            assert section.locator("dt").all_inner_texts() == ["Stage 0, rank 0", "Stage 1, rank 2"]
            said = section.locator(".bar").first.get_attribute("aria-label")
            assert said == "measured 8 GiB: weights 4 GiB, gradients 1 GiB, optimizer 2 GiB, activations 1 GiB"
            assert section.locator("dd span").nth(1).inner_text().startswith("planned 10 GiB: weights 4 GiB")
            whole = section.locator(".bar").first.bounding_box()["width"]
            weights = section.locator(".bar i.weights").first.bounding_box()["width"]
            assert weights / whole == pytest.approx(0.4, abs=0.01)  # of the largest, which is planned
            rows = [row.split("\t") for row in section.locator("tbody tr").all_inner_texts()]
            assert rows[0] == ["0", "0", "4 GiB", "1 GiB", "2 GiB", "1 GiB", "0 MiB", "8 GiB", "20 GiB", "0 MiB"]
            assert rows[3][-1] == "1 GiB" and len(rows) == 4
            colours = {
                section.locator(f".legend i.{part}").evaluate("node => getComputedStyle(node).backgroundColor")
                for part in parts
            }
            assert len(colours) == 5 and "rgba(0, 0, 0, 0)" not in colours
            assert "Memory weights" not in page.locator("main").inner_text()  # no chart of each part
            ratio, where = worst_contrast(page, "#memory ~ .card p, #memory ~ .card span, #memory ~ .card td")
            assert ratio >= 4.5, where
            assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_run_without_it_and_a_file_that_is_another(tmp_path):
    folder = save_folder(tmp_path / "run")
    assert "Memory by phase" not in write_report(folder).read_text(encoding="utf-8")
    (folder / "memory.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(ConfigError, match="memory.json.*is not the memory of a run's ranks"):
        collect(folder)
