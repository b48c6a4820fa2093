"""Real runs and their pages: stopped, resumed and finished, failed, switched off; the commands a page shows are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil

import pytest

from primus_bridge.cli.main import main
from primus_bridge.config.arguments import ModelArguments
from primus_bridge.report.layout import Layout
from primus_bridge.report.notes import read_events
from tests.cli.example import alpaca_rows, loss_lines, train_words, workplace, write_rows
from tests.preview.browser import chromium, opened

RUN = dict(train_iters=8, save_interval=3, eval_interval=4, validation_data_path="held_out.json", convert_to_hf=True)
RUN |= dict(use_lora=True, lora_rank=4, save_merged_model=True, lr_warmup_iters=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder to stand in; in run/ eight steps of LoRA in two starts, and in stopped.html the page of the first."""
    with workplace(tmp_path_factory.mktemp("report")) as root:
        write_rows(root / "rows.json", alpaca_rows(30))
        write_rows(root / "held_out.json", alpaca_rows(43)[30:])
        words = train_words("model", "rows.json", "run", **RUN)
        assert main([*words, "--exit_after_save"]) == 0
        shutil.copy("run/report.html", "stopped.html")
        assert main(words) == 0
        yield root


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def snippets(page) -> dict[str, str]:
    titles, codes = page.locator(".snippet h3"), page.locator(".snippet pre")
    return dict(zip(titles.all_inner_texts(), codes.all_inner_texts(), strict=True))


def command(text: str) -> list[str]:
    """The words of a ``primus`` command as a shell would read them."""
    first, *words = shlex.split(text.replace("\\\n", " "))
    assert first == "primus"
    return words


def test_the_curves_are_the_metrics(browser, root):
    lines = loss_lines(root / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    with opened(browser, root / "run" / "report.html") as page:
        page.locator("label:has(input[value='0'])").click()  # no smoothing
        assert page.locator("figure").count() == 7
        for index, key in enumerate("loss lr grad_norm tokens_per_second step_time memory tokens".split()):
            figure = page.locator("figure").nth(index)
            points = figure.locator("polyline.a").get_attribute("points").split()
            heights = [float(point.split(",")[1]) for point in points]
            across = [float(point.split(",")[0]) for point in points]
            values = [line[key] for line in lines]
            assert len(points) == 8
            assert across == pytest.approx([across[0] + i * (across[-1] - across[0]) / 7 for i in range(8)], abs=0.01)
            low, high = values.index(min(values)), values.index(max(values))
            if low == high:
                continue
            slope = (heights[high] - heights[low]) / (values[high] - values[low])
            assert slope < 0  # upwards in an SVG
            for height, value in zip(heights, values, strict=True):
                assert height == pytest.approx(heights[low] + slope * (value - values[low]), abs=0.03), key
            figure.locator("summary").click()
            figure.locator("tbody tr").first.wait_for()
            rows = figure.locator("tbody").first.locator("tr").all_inner_texts()
            factor = 2**-30 if key == "memory" else 1
            assert [float(row.split("\t")[1]) / factor for row in rows] == values
        held_out = [json.loads(text) for text in (root / "run" / "metrics.jsonl").read_text().splitlines()]
        held_out = [line["eval_loss"] for line in held_out if "eval_loss" in line]
        rows = page.locator("figure").first.locator("tbody").last.locator("tr").all_inner_texts()
        assert [float(row.split("\t")[1]) for row in rows] == held_out and len(held_out) == 2


def test_pointing_and_keys_tell_the_values_of_a_step(browser, root):
    lines = loss_lines(root / "run")
    with opened(browser, root / "run" / "report.html") as page:
        loss, rate = page.locator("figure").nth(0), page.locator("figure").nth(1)
        assert loss.locator(".readout").inner_text().startswith("step 8 training")
        loss.locator(".plot").scroll_into_view_if_needed()
        box = loss.locator("polyline.a").last.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 2.2 / 7, box["y"] + box["height"] / 2)
        told = loss.locator(".readout").inner_text()
        assert told.startswith(f"step 3 training {lines[2]['loss']:.4g}") and "at step 4" in told
        assert rate.locator(".readout").inner_text().startswith("step 3 ")  # every chart follows
        assert loss.locator(".cursor").count() == rate.locator(".cursor").count() == 1
        loss.locator(".plot").focus()
        for key, step in (("Home", 1), ("ArrowRight", 2), ("End", 8), ("ArrowLeft", 7), ("ArrowLeft", 6)):
            page.keyboard.press(key)
            assert loss.locator(".readout").inner_text().startswith(f"step {step} "), key
        assert loss.locator(".readout").get_attribute("aria-live") == "polite"
        page.keyboard.press("Escape")
        assert loss.locator(".cursor").count() == 0


def test_the_story_of_the_run(browser, root):
    events = read_events(root / "run")
    assert [(entry["event"], entry["step"]) for entry in events] == [
        ("start", 0), ("save", 3), ("end", 3), ("start", 3), ("save", 6), ("save", 8), ("export", 8), ("end", 8),
    ]  # fmt: skip
    with opened(browser, root / "stopped.html") as page:
        assert page.locator(".status").inner_text() == "Stopped early at step 3 of 8."
        assert list(snippets(page)) == [
            "Go on from step 3, in the folder in which it was started",
            "Export the newest checkpoint to Hugging Face's format",
        ]
    with opened(browser, root / "run" / "report.html") as page:
        assert page.locator(".status").inner_text() == "Finished: step 8 of 8."
        lead = page.locator(".lead").inner_text()
        assert lead == "Supervised fine-tuning of model: LoRA rank 4, alpha 32, fp32, 1 rank."
        facts = page.locator(".facts").inner_text()
        assert "Best evaluation loss" in facts and "in 2 starts" in facts
        tokens = sum(line["tokens"] for line in loss_lines(root / "run"))
        assert f"Tokens\n{tokens:,}\n" in facts  # a line a step: their sum is what the totals must give
        assert page.locator("figure").first.locator(".saved").count() == 3
        happened = page.locator("section[aria-labelledby=happened] tbody tr").all_inner_texts()
        assert [row.split("\t")[1] for row in happened] == [
            "started", "checkpoint", "ended", "resumed", "checkpoint", "checkpoint", "exported", "ended",
        ]  # fmt: skip
        assert "torch" in page.locator("section[aria-labelledby=environment]").inner_text()


def test_arguments_can_be_searched(browser, root):
    with opened(browser, root / "run" / "report.html") as page:
        table, found = page.locator("#arguments-table"), page.locator("#found")
        shown = table.locator("tr:visible th[scope=row]")
        heads = table.locator("tr.group:visible").all_inner_texts()
        assert heads[0].startswith("Changed from the default (") and "adam_eps" not in table.inner_text()
        changed = table.locator("tbody").first.inner_text()
        assert "optimizer.lr\t0.001\ndefault 5e-06\n\tcommand line --lr" in changed
        assert not re.search(r"\tdefault$", changed, re.MULTILINE)  # the stage's is another in each dialect
        search = page.get_by_label("Search")
        search.fill("ADAM eps")
        assert shown.all_inner_texts() == ["optimizer.adam_eps"]
        assert re.fullmatch(r"1 of \d+ arguments", found.inner_text())
        search.fill("--lora_rank")
        assert shown.all_inner_texts() == ["peft.dim"]  # by its source, too
        search.fill("no such thing")
        assert shown.count() == 0 and table.locator("tr.group:visible").count() == 0
        search.fill("")
        page.locator("label:has(input[value='all'])").click()
        assert "optimizer.adam_eps" in shown.all_inner_texts()
        total = int(found.inner_text().split()[2])
        assert shown.count() == total > 90


def test_the_commands_on_the_page_run(browser, root, capfd):
    with opened(browser, root / "run" / "report.html") as page:
        shown = snippets(page)
    scope: dict = {}
    exec(shown["Load the adapter over its base"], scope)
    inputs = scope["tokenizer"]("say 1", return_tensors="pt")
    adapted = scope["model"](**inputs).logits
    exec(shown["Load the merged model"], scope)
    assert (adapted - scope["model"](**inputs).logits).abs().max() < 1e-4
    assert shown["Serve both with vLLM"].count("--max-lora-rank 8") == 1
    # from the page of the run that stopped: going on does nothing more here, as the run has ended since
    with opened(browser, root / "stopped.html") as page:
        go_on, export = snippets(page).values()
    shutil.rmtree("run/hf")
    assert main(command(export)) == 0 and (root / "run" / "hf" / "adapter_config.json").is_file()
    capfd.readouterr()
    assert main(command(go_on)) == 0
    assert "nothing to train: the checkpoint is at step 8 of 8" in capfd.readouterr().out


def test_primus_report_makes_the_page_again(browser, root, capsys):
    before = (root / "run" / "report.html").read_text()
    assert main(["report", "run", "--html", "again.html"]) == 0
    assert capsys.readouterr().out == "report: again.html\n"
    assert (root / "again.html").read_text().split("</head>")[0] == before.split("</head>")[0]
    with opened(browser, root / "again.html") as page:
        assert page.locator(".status").inner_text() == "Finished: step 8 of 8."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model"], "model: is not the save folder of a run: it has no run.yaml"),
        (["nowhere"], "nowhere: no such folder; give the save folder of a run"),
        ([], "give one save folder: primus report SAVE [--html FILE]; see primus report --help"),
        (["run", "--htm", "x"], "unknown option '--htm' - did you mean '--html'?; see primus report --help"),
        (["run", "--html", "model"], "model: --html: is a folder; give a file"),
    ],
)
def test_what_the_user_can_mend(root, capsys, words, message):
    assert main(["report", *words]) == 2
    assert capsys.readouterr() == ("", f"primus: {message}\n")


def test_a_run_that_fails_says_so_at_the_top(browser, root, capfd):
    words = train_words("model", "rows.json", "failed", lr="1e30", train_iters=6)
    assert main(words) != 0
    error = capfd.readouterr().err
    assert "training diverged" in error and "report.html" not in error
    events = read_events(root / "failed")
    assert [entry["event"] for entry in events] == ["start", "error"] and events[-1]["traceback"] is None
    with opened(browser, root / "failed" / "report.html") as page:
        status = page.locator(".status.failed").inner_text()
        assert status.startswith(f"Failed after step {events[-1]['step']} of 6: training diverged at step ")
        assert list(snippets(page)) == ["Start it again, in the folder in which it was started"]


def test_switched_off(root):
    assert main([*train_words("model", "rows.json", "quiet"), "--logger.report", "false"]) == 0
    assert not {"report.html", "events.jsonl", "environment.json"} & set(os.listdir("quiet"))
    assert main(["report", "quiet"]) == 0 and (root / "quiet" / "report.html").is_file()


@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (2, 2, 2, 3), (1, 1, 1, 8), (4, 2, 1, 2)])
def test_ranks_stand_where_megatron_puts_them(sizes):
    from megatron.core.parallel_state import RankGenerator

    tensor, context, data, pipeline = sizes
    world = tensor * context * data * pipeline
    model = ModelArguments(
        tensor_model_parallel_size=tensor, context_parallel_size=context, pipeline_model_parallel_size=pipeline
    )
    layout = Layout.of(model, world)
    assert layout.data == data
    order = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    groups = {
        "tp": [
            [layout.rank(t, c, d, p) for t in range(tensor)]
            for p in range(pipeline) for d in range(data) for c in range(context)
        ],
        "cp": [
            [layout.rank(t, c, d, p) for c in range(context)]
            for p in range(pipeline) for d in range(data) for t in range(tensor)
        ],
        "dp": [
            [layout.rank(t, c, d, p) for d in range(data)]
            for p in range(pipeline) for c in range(context) for t in range(tensor)
        ],
        "pp": [
            [layout.rank(t, c, d, p) for p in range(pipeline)]
            for d in range(data) for c in range(context) for t in range(tensor)
        ],
    }  # fmt: skip
    for name, expected in groups.items():
        assert order.get_ranks(name) == expected, name
