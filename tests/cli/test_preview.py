"""primus preview from outside: config and data in; terminal, JSON lines and a page out; what a user can have wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from primus_bridge.cli.main import main
from tests.cli.command import run
from tests.cli.example import tree, write_rows
from tests.data import families
from tests.preview.browser import chromium, opened

CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Say\n{i} 🙂"},
            {"role": "assistant", "content": f"answer {i}"},
            {"role": "user", "content": "</script><script>window.hacked=1</script> <|im_end|> \x1b[31m"},
            {"role": "assistant", "content": f"日本 {i}"},
        ]
    }
    for i in range(12)
]
CONFIG = """\
framework: megatron_bridge
data:
  data_path: chats.jsonl
  tokenizer_model: tokenizer
  seq_length: 256
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a tokenizer, chats and a config; no model."""
    monkeypatch.setenv("PRIMUS_BRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    families.qwen().save_pretrained("tokenizer")
    write_rows(Path("chats.jsonl"), CHATS)
    Path("run.yaml").write_text(CONFIG)
    return tmp_path


def previewed(*words: str) -> list[dict]:
    """The lines of --json of a preview that works."""
    assert main(["preview", *words, "--json", "out.jsonl"]) == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_in_order_of_the_data(place, capsys):
    lines = previewed("--config", "run.yaml", "--num", "2", "--shuffle", "false")
    assert len(lines) == 2
    for i, line in enumerate(lines):
        assert line["supervised_text"] == f"answer {i}<|im_end|>日本 {i}<|im_end|>"
        assert line["text"] == families.qwen().decode(line["ids"]) == "".join(line["pieces"])
        assert line["text"].startswith(
            f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay\n{i} 🙂<|im_end|>"
        )
        supervised = [piece for piece, weight in zip(line["pieces"], line["loss_weights"], strict=True) if weight]
        assert "".join(supervised) == line["supervised_text"]
        assert line["position_ids"] == list(range(len(line["ids"]))) and set(line["segments"]) == {0}
        assert line["sources"] == [f"chats.jsonl:{i + 1}"]
        turns = dict(zip(line["turns"], line["roles"], strict=True))
        assert turns == {0: "system", 1: "user", 2: "assistant", 3: "user", 4: "assistant"}
        assert {turn for turn, weight in zip(line["turns"], line["loss_weights"], strict=True) if weight} == {2, 4}
        assert len({len(line[key]) for key in ("ids", "loss_weights", "turns", "roles", "pieces", "segments")}) == 1
    out = capsys.readouterr().out
    assert out.startswith("the first 2 of 12 sequences of the train split\n")
    assert "⟦answer 1<|im_end|>⟧↵\n<|im_start|>user↵\n</script><script>window.hacked=1</script> <|im_end|> ␛[31m" in out
    assert "\x1b" not in out
    ledger = out[out.rindex("⟧") :]
    assert re.search(r"^rows read +12$", ledger, re.M) and re.search(r"^samples +12$", ledger, re.M)
    assert "format messages" in ledger and "template" in ledger
    # only what was asked for is written
    assert {path for path in tree(place) if not path.startswith(("cache", "tokenizer"))} == {
        "chats.jsonl",
        "run.yaml",
        "out.jsonl",
    }


def test_packed(place):
    lines = previewed("--config", "run.yaml", "--packed_sequence", "true", "--num", "100")
    assert sum(len(line["sources"]) for line in lines) == 12 and len(lines) < 12
    assert sorted(source for line in lines for source in line["sources"]) == sorted(
        f"chats.jsonl:{i}" for i in range(1, 13)
    )
    for line in lines:
        assert len(line["ids"]) - len(line["sources"]) <= 256
        starts = [i for i, position in enumerate(line["position_ids"]) if position == 0]
        assert [line["segments"][i] for i in starts] == list(range(len(line["sources"])))
        assert all(line["loss_weights"][i] == 0 for i in starts)


def test_weights_of_the_prompt(place):
    (line,) = previewed("--config", "run.yaml", "--num", "1", "--prompt_loss_weight", "0.1")
    assert set(line["loss_weights"]) == {0.0, 0.1, 1.0}


def test_the_validation_split(place, capsys):
    train = previewed("--config", "run.yaml", "--validation_split", "0.25", "--num", "99")
    validation = previewed("--config", "run.yaml", "--validation_split", "0.25", "--num", "99", "--split", "validation")
    assert (len(train), len(validation)) == (9, 3)
    assert not {str(line["sources"]) for line in train} & {str(line["sources"]) for line in validation}
    assert "the first 3 of 3 sequences of the validation split" in capsys.readouterr().out


def test_streaming(place, capsys):
    lines = previewed("--config", "run.yaml", "--streaming", "true", "--streaming_window", "4", "--shuffle", "false")
    assert [line["sources"] for line in lines] == [["chats.jsonl:1"], ["chats.jsonl:2"], ["chats.jsonl:3"]]
    assert "the first 3 of 4 sequences of the first window of the train split" in capsys.readouterr().out


def test_pretraining(place):
    write_rows(Path("texts.jsonl"), [{"text": "the answer is five " * 30} for _ in range(4)])
    words = ("pretrain", "--config", "run.yaml", "--data_path", "texts.jsonl", "--seq_length", "32", "--num", "2")
    for line in previewed(*words):
        assert line["loss_weights"] == [0.0] + [1.0] * 32 and len(line["ids"]) == 33
        assert set(line["turns"]) == {-1} and set(line["roles"]) == {""}
        assert line["text"] == families.qwen().decode(line["ids"])


def test_sentencepiece(place):
    folder = place / "sentencepiece"
    folder.mkdir()
    families.sentencepiece_folder(folder)
    rows = [{"instruction": "Add 3 and 4 🙂", "input": "", "output": "日本 seven"}]
    write_rows(Path("alpaca.json"), rows)
    (line,) = previewed("--data_path", "alpaca.json", "--hf_model_name_or_path", "sentencepiece", "--seq_length", "512")
    assert line["text"].endswith("Add 3 and 4 🙂\n\n### Response:\n日本 seven</s>")
    assert line["supervised_text"] == "日本 seven</s>"


def test_the_page_is_the_json(place):
    lines = previewed("--config", "run.yaml", "--packed_sequence", "true", "--num", "2", "--html", "page.html")
    with chromium() as browser, opened(browser, place / "page.html") as page:
        for number, line in enumerate(lines):
            card = page.locator(f"#sequence-{number}")
            assert card.locator(".t").count() == len(line["ids"])
            assert card.locator(".t.full").count() == sum(weight > 0 for weight in line["loss_weights"])
            assert "".join(card.locator(".t.full").all_text_contents()) == line["supervised_text"]
            assert card.locator(".tokens").count() == len(line["sources"])
            assert card.locator("h4").last.inner_text().endswith(line["sources"][-1])
            index = len(line["ids"]) - 3
            card.locator(".t").nth(index).click()
            terms, values = page.locator("#details dt"), page.locator("#details dd")
            told = dict(zip(terms.all_inner_texts(), values.all_inner_texts(), strict=True))
            assert told["id"] == str(line["ids"][index]) and told["position"] == str(line["position_ids"][index])
            assert told["turn"] == str(line["turns"][index]) and told["role"] == line["roles"][index]
            assert told["segment"] == str(line["segments"][index])
        assert page.evaluate("window.hacked") is None
        assert page.locator("figure").count() == 3
        assert page.locator("figure svg").first.get_attribute("aria-label").startswith("Tokens a sample: 12 counted")


def test_colour_when_forced(place):
    result = run(
        "preview", "--config", "run.yaml", "--num", "1", env={"NO_COLOR": "", "FORCE_COLOR": "1", "TERM": "xterm"}
    )
    assert (result.code, result.err) == (0, ""), result.err
    assert "\x1b[1;32manswer" in result.out and "⟦" not in result.out
    assert "␛[31m" in result.out  # the data's own


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config", "run.yaml", "--num", "0"], "--num must be a whole number above 0, got '0'"),
        (["--config", "run.yaml", "--num", "some"], "--num must be a whole number above 0, got 'some'"),
        (["--config", "run.yaml", "--num"], "--num needs a value: --num N"),
        (["--config", "run.yaml", "--split", "test"], "--split must be train or validation, got 'test'"),
        (["--config", "run.yaml", "--split", "validation"], "there is no validation set"),
        (["--config", "run.yaml", "--html", "tokenizer"], "tokenizer: --html: is a folder; give a file"),
        (["--config", "run.yaml", "--json", "no/out.jsonl"], "--json: there is no folder"),
        (["--config", "run.yaml", "--seq_lenght", "9"], "did you mean"),
        (["--config", "run.yaml", "--data_path", "none.json"], "none.json"),
        (["--config", "run.yaml", "--tokenizer_model", "./none"], "no such folder"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--data_path", "chats.jsonl"], "no tokenizer: give hf_model_name_or_path"),
        (["--tokenizer_model", "tokenizer"], "no data: give data.data_path"),
        (["finetune", "--config", "run.yaml"], "unknown stage 'finetune'"),
        ([], "nothing to preview"),
    ],
)
def test_what_a_user_can_have_wrong(place, capsys, words, message):
    before = tree(place)
    assert main(["preview", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("primus: ") and message in said.err and "Traceback" not in said.err
    assert said.out == ""
    assert {path for path in tree(place) if not path.startswith("cache")} == set(before)


def test_a_bad_row_is_named(place, capsys):
    write_rows(Path("chats.jsonl"), [*CHATS, {"messages": [{"role": "user"}]}])
    assert main(["preview", "--config", "run.yaml"]) == 2
    assert "chats.jsonl:13" in capsys.readouterr().err
