"""The page of save folders of every kind in a real browser: what it says and draws, and that data stays data."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time

import pytest

from primus_bridge.callbacks.base import RunState
from primus_bridge.callbacks.curve import smooth
from primus_bridge.callbacks.report import ReportCallback
from primus_bridge.errors import ConfigError
from primus_bridge.report.collect import collect
from primus_bridge.report.headline import status
from primus_bridge.report.notes import note, read_events
from primus_bridge.report.page import write_report
from tests.preview.browser import chromium, opened, worst_contrast
from tests.report.folders import ledger, line, save_folder, write_lines

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> <!-- \x1b[31m &lt; "\''


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def switch(page, value: str) -> None:
    page.locator(f"label:has(input[value='{value}'])").click()


def tiles(page) -> dict[str, str]:
    names, values = page.locator(".facts dt"), page.locator(".facts dd")
    return dict(zip(names.all_inner_texts(), values.all_inner_texts(), strict=True))


def data_of(file) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.S)[1])


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A hundred thousand log lines, a thousand evaluations; saved, killed, resumed, saved, killed."""
    folder = save_folder(tmp_path_factory.mktemp("long") / "run", 120_000, note_end=False)
    lines = []
    for step in range(1, 100_001):
        lines.append(line(step, loss=50.0 if step == 43_210 else 1.0 + 1e-6 * step))
        if step % 100 == 0:
            lines.append({"step": step, "eval_loss": 2.0 - 1e-6 * step, "eval_supervised_tokens": 10})
    write_lines(folder, lines)
    note(folder, "save", 30_000, checkpoint="iter_0030000")
    note(folder, "start", 30_000, train_iters=120_000, ranks=8, notes=["my.yaml:9: 'x' has no effect here"])
    note(folder, "save", 90_000, checkpoint="iter_0090000")
    return folder


def test_a_hundred_thousand_lines(browser, long):
    started = time.process_time()
    file = write_report(long)
    assert time.process_time() - started < 20  # about two on an idle machine
    assert file.stat().st_size < 2_000_000
    with opened(browser, file) as page:
        assert "Of 100,000 log lines the page holds up to 1,000 parts" in page.locator("#buckets").inner_text()
        loss = page.locator("figure").first
        assert len(loss.locator("polygon.band").get_attribute("points").split()) == 2000
        # one line of a hundred thousand is in the band, and in the numbers
        loss.locator("summary").click()
        loss.locator("tbody tr").first.wait_for()
        row = loss.locator("tbody tr", has_text="43,201 to 43,300").first.locator("td").all_inner_texts()
        assert float(row[3]) == 50.0 and float(row[2]) == pytest.approx(1.043201, rel=1e-5)
        assert loss.locator("caption").all_inner_texts() == ["training", "evaluation"]
        assert loss.locator(".resumed").count() == 1 and loss.locator(".saved").count() == 2
        status = page.locator(".status").inner_text()
        assert status.startswith("Not finished when this page was written (") and "step 100,000 of 120,000" in status
        assert tiles(page)["Steps"] == "100,000 of 120,000" and tiles(page)["Wall time"].endswith("in 2 starts")
        assert "'x' has no effect here" in page.locator("main").inner_text()


def test_what_is_hostile_stays_text(browser, tmp_path):
    given = {"dataset.data_path": HOSTILE.replace("\x1b", ""), "checkpoint.hf_model_name_or_path": "<b>model</b>"}
    folder = save_folder(tmp_path / "a <b>run", given=given)
    book = ledger(warnings=[HOSTILE])
    book.sources[0].name = book.template = HOSTILE
    (folder / "ledger.json").write_text(json.dumps(book.to_dict()))
    write_lines(folder, [line(step, **{HOSTILE: float(step)}) for step in range(1, 9)])
    note(folder, "start", 4, train_iters=20, ranks=8, notes=[HOSTILE])
    note(folder, "error", 5, message=HOSTILE, traceback=HOSTILE)
    with opened(browser, write_report(folder)) as page:
        assert page.evaluate("window.hacked") is None
        assert page.locator("main img, main b:has-text('run'), h1 b").count() == 0
        assert "</script><script>window.hacked" in page.locator(".status").inner_text()
        page.locator("#search").fill("data_path")
        assert "</script><script>window.hacked" in page.locator("#arguments-table").inner_text()
        assert "<b>model</b>" in page.locator(".lead").inner_text()
        assert page.locator("h1").inner_text() == "a <b>run"


def test_the_page_needs_nothing_else(long):
    text = write_report(long).read_text(encoding="utf-8")
    page = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    assert not re.search(r"""(src|href)=["']?[^#"']|@import|url\(|fetch\(|XMLHttpRequest""", page)
    assert re.findall(r"https?://[^\"' ]*", page) == ["http://www.w3.org/2000/svg"]  # the name of SVG, not an address


def test_gaps_logarithm_and_numbers_of_ones_own(browser, tmp_path):
    folder = save_folder(tmp_path / "run", 30)
    changes = {5: {"loss": None}, 6: {"grad_norm": float("nan")}, 7: {"loss": float("inf")}, 30: {"lr": 0.0}}
    write_lines(folder, [line(step, accuracy=step / 30, **changes.get(step, {})) for step in range(1, 31)])
    file = write_report(folder)
    values = data_of(file)["tables"]["train"]["columns"]["loss"]["mean"]
    assert values[4] is values[6] is None and values[5] == line(6)["loss"]
    with opened(browser, file) as page:
        titles = page.locator("figcaption > b").all_inner_texts()
        assert titles[:2] == ["Loss", "Learning rate"] and titles[-1] == "Accuracy"
        switch(page, "0")  # no smoothing
        loss, rate = page.locator("figure").nth(0), page.locator("figure").nth(1)
        drawn = [len(node.get_attribute("points").split()) for node in loss.locator("polyline").all()]
        assert drawn == [4, 1, 23]
        switch(page, "log")
        points = loss.locator("polyline").last.get_attribute("points").split()
        heights = [float(point.split(",")[1]) for point in points]
        logs = [math.log(value) for value in values[7:]]
        slope = (heights[-1] - heights[0]) / (logs[-1] - logs[0])
        for height, value in zip(heights, logs, strict=True):
            assert height == pytest.approx(heights[0] + slope * (value - logs[0]), abs=0.05)
        assert len(rate.locator("polyline").get_attribute("points").split()) == 29  # 0 has no logarithm
        switch(page, "linear")
        assert len(rate.locator("polyline").get_attribute("points").split()) == 30


def test_smoothing_is_that_of_the_picture(browser, tmp_path):
    """loss.png and the page draw the same line."""
    with opened(browser, write_report(save_folder(tmp_path / "run", 200))) as page:
        losses = [line(step)["loss"] for step in range(1, 201)]
        for parts in (100, 40, 10):
            switch(page, str(parts))
            loss = page.locator("figure").first
            raw, smoothed = (
                [float(point.split(",")[1]) for point in loss.locator(css).get_attribute("points").split()]
                for css in (".raw", ".smooth")
            )
            slope = (raw[-1] - raw[0]) / (losses[-1] - losses[0])
            expected = [raw[0] + slope * (value - losses[0]) for value in smooth(losses, 200 / parts)]
            assert smoothed == pytest.approx(expected, abs=0.05)
            assert f", smoothed {smooth(losses, 200 / parts)[-1]:.4g}" in loss.locator(".readout").inner_text()


def test_ledger_layout_speed_and_environment(browser, tmp_path):
    with opened(browser, write_report(save_folder(tmp_path / "run"))) as page:
        table = page.locator("section[aria-labelledby=ledger] table")
        assert table.locator("th").all_inner_texts()[1:] == ["alpaca.jsonl", "faq.csv", "train", "validation"]
        rows = {cells[0]: cells[1:] for cells in (row.split("\t") for row in table.inner_text().split("\n")[1:])}
        assert rows["rows read"] == ["100", "20", "120", "5"]
        assert rows["dropped: longer than seq_length"] == ["6", "0", "6", "0"]
        assert rows["supervised"] == ["4,000", "300", "4,300", "50"]
        bars = page.locator(".bars .bar")
        assert bars.first.get_attribute("aria-label") == "Tokens: 61.5 % supervised, 30.8 % masked, 7.7 % cut off"
        assert bars.nth(1).get_attribute("aria-label") == "Samples: 81.0 % whole, 9.0 % truncated, 10.0 % dropped"
        box, part = bars.first.bounding_box(), bars.first.locator("i").first.bounding_box()
        assert part["width"] / box["width"] == pytest.approx(0.615, abs=0.01)
        cells = page.locator(".ranks tbody td").all_inner_texts()
        assert [cell.split() for cell in cells] == [["0", "1"], ["4", "5"], ["2", "3"], ["6", "7"]]
        speed = page.locator("section[aria-labelledby=speed]").inner_text()
        assert "Tokens per second and rank\t62\t62\t62\t62" in speed and "Step time\t2 s" in speed
        assert "3 GiB" in speed
        environment = page.locator("section[aria-labelledby=environment]").inner_text()
        assert "MI300X, 192 GiB" in environment and "datasets\tmissing" in environment
        assert "it needs a GPU" in environment and "unused" not in environment


def test_a_run_without_notes_ledger_or_lines(browser, tmp_path):
    folder = save_folder(tmp_path / "run", given={"logger.report": False})
    for name in ("events.jsonl", "ledger.json", "environment.json", "metrics.jsonl"):
        (folder / name).unlink()
    with opened(browser, write_report(folder)) as page:
        assert page.locator("figure, section[aria-labelledby=ledger]").count() == 0
        assert "No step was logged." in page.locator("main").inner_text()
        assert page.locator("#arguments-table").is_visible() and tiles(page)["Steps"] == "0 of 20"


def test_contrast_and_a_phone(browser, long, tmp_path):
    texts = "p, dt, dd, h1, h2, h3, td:not(.numbers td), th, li, span, b, summary, legend, label, pre, output, svg text"
    failed = save_folder(tmp_path / "run", 30)
    note(failed, "start", 4, train_iters=30, ranks=8, notes=["a note"])
    note(failed, "error", 5, message="out of memory", traceback="Traceback\n" + "x" * 300)
    for file, dark in ((write_report(failed), False), (failed / "report.html", True), (write_report(long), True)):
        with opened(browser, file, width=360, height=740, dark=dark) as page:
            switch(page, "all")
            opens = "document.querySelectorAll('.status details, figure:first-child details')"
            page.evaluate(f"{opens}.forEach(details => details.open = true)")
            page.locator("figure tbody tr").first.wait_for()
            ratio, where = worst_contrast(page, texts)
            assert ratio >= 4.5, (dark, where)
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            assert page.locator("figure svg").first.bounding_box()["width"] < 340


def test_how_a_run_ended(tmp_path):
    folder = save_folder(tmp_path / "run", 20, note_end=False)
    assert "Not finished when this page was written (20" in status(collect(folder))
    note(folder, "end", 12, reason="SIGTERM received")
    write_lines(folder, [line(step) for step in range(1, 13)])
    assert "<p>Stopped early at step 12 of 20: SIGTERM received.</p>" in status(collect(folder))
    note(folder, "start", 12, train_iters=20, ranks=8, notes=[])
    note(folder, "error", 15, message="bus error", traceback="at <module>")
    assert collect(folder).outcome == "failed"
    assert "<p>Failed after step 15 of 20: bus error</p>" in status(collect(folder))
    assert "<pre>at &lt;module&gt;</pre>" in status(collect(folder))
    note(folder, "start", 12, train_iters=20, ranks=8, notes=[])
    note(folder, "end", 20, reason=None)
    note(folder, "export", 20, folder="hf")
    assert "<p>Finished: step 20 of 20.</p>" in status(collect(folder))


def test_it_needs_no_torch(tmp_path):
    folder = save_folder(tmp_path / "run")
    script = f"""
import sys
from primus_bridge.cli.main import main
assert main(["report", {str(folder)!r}]) == 0
print([name for name in ("torch", "megatron", "transformers", "datasets", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"report: {folder / 'report.html'}", "[]"]


def test_notes_are_lines_that_a_kill_cannot_cut(tmp_path):
    note(tmp_path, "start", 0, train_iters=9, ranks=1, notes=[])
    note(tmp_path, "save", 4, checkpoint="iter_0000004")
    note(tmp_path, "start", 4, train_iters=9, ranks=1, notes=[])
    assert [(entry["event"], entry["step"]) for entry in read_events(tmp_path)] == [
        ("start", 0), ("save", 4), ("start", 4),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]
    note(tmp_path, "start", 0, train_iters=9, ranks=1, notes=[])  # from the beginning: another run
    assert len(read_events(tmp_path)) == 1


WHEN = '"time": "2026-03-01T09:30:00+00:00", "step": 0'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("events.jsonl", '{"event": "start"}\n', "is not the events file of a run; remove it to do without"),
        ("events.jsonl", f'{{"event": "start", {WHEN}}}\n', "is not the events file of a run; remove it to do without"),
        ("events.jsonl", f'{{"event": "save", {WHEN}}}\n', "is not the events file of a run; remove it to do without"),
        ("environment.json", "[]", "does not hold a JSON object; remove it to do without"),
        ("environment.json", "{}", "is not the environment of a run; remove it to do without"),
        ("ledger.json", '{"sources": 3}', "is not the ledger of a run; remove it to do without"),
        ("metrics.jsonl", '{"step": "x"}\n', "has a line whose step is no whole number; remove that line"),
        (
            "metrics.jsonl",
            '{"step": 1, "eval_loss": "x"}\n',
            "has a line whose eval_loss is no number; remove that line",
        ),
    ],
)
def test_a_file_that_no_run_wrote_is_named(tmp_path, name, content, message):
    folder = save_folder(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        collect(folder)
    assert str(caught.value) == f"{folder / name}: {message}"


@pytest.mark.parametrize("damage", [b'{"event": "start", "ti', b'{"event": "save", "step": 1}\n', b"\xff\n"])
def test_a_damaged_list_of_events_does_not_refuse_the_run(tmp_path, capsys, damage):
    folder = save_folder(tmp_path / "run")
    arguments = collect(folder).arguments
    (folder / "events.jsonl").write_bytes(damage)
    callback, state = ReportCallback(), RunState(arguments, step=3, train_iters=20, world_size=8)
    callback.on_train_start(state)
    assert capsys.readouterr().out == (
        f"note: {folder / 'events.jsonl'} was not the events file of a run: it is events.jsonl.damaged now\n"
    )
    assert (folder / "events.jsonl.damaged").read_bytes() == damage
    state.step = 20
    callback.on_train_end(state)
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert [(entry["event"], entry["step"]) for entry in read_events(folder)] == [("start", 3), ("end", 20)]


def test_a_page_that_cannot_be_made_does_not_end_the_run(tmp_path, capsys):
    folder = save_folder(tmp_path / "run")
    state = RunState(collect(folder).arguments, step=20, train_iters=20)
    (folder / "ledger.json").write_text("[]")
    ReportCallback().on_train_end(state)
    assert capsys.readouterr().out == (
        f"report.html was not written: {folder / 'ledger.json'}: does not hold a JSON object; remove it to do without\n"
    )
