"""Sources: every kind of file gives the same rows, from any start, and what is malformed is named by file and line."""

from __future__ import annotations

import csv
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from primus_bridge.data.sources import Source, names_splits
from primus_bridge.errors import ConfigError

from .conftest import alpaca_rows

ROWS = alpaca_rows(5)
# a date that a guessing reader makes a timestamp, nested values, and what is not ASCII
MANY = [
    {"instruction": f"Add {i} 😀 漢字\r\n", "output": "2020-01-01 00:00:00", "turns": [{"n": i, "parts": ["a", None]}]}
    for i in range(2500)
]


def refused(path, **options) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        list(Source(str(path), **options))
    return caught.value


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_zst(path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(content)


def write_arrow(path, rows, writer) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, writer(file, table.schema) as out:
        out.write_table(table, max_chunksize=999)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, str]:
    """MANY in every kind of file and folder: name -> path."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "a.json").write_bytes(json.dumps(MANY).encode())
    (folder / "b.jsonl").write_bytes(jsonl(MANY))
    (folder / "c.json.gz").write_bytes(gzip.compress(json.dumps(MANY).encode()))
    (folder / "d.ndjson.gz").write_bytes(gzip.compress(jsonl(MANY)))
    write_zst(folder / "e.jsonl.zst", jsonl(MANY))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MANY), folder / "f.parquet", row_group_size=1100)
    write_arrow(folder / "stream.arrow", MANY, pyarrow.ipc.new_stream)
    write_arrow(folder / "file.arrow", MANY, pyarrow.ipc.new_file)
    library = datasets.Dataset.from_list(MANY)
    library.save_to_disk(folder / "saved")
    datasets.DatasetDict({"test": library.select([0]), "train": library}).save_to_disk(folder / "saved_splits")
    for i, begin in enumerate((0, 1000, 2000)):
        (folder / "shards").mkdir(exist_ok=True)
        name = f"train-{i}.jsonl" + (".gz" if i == 1 else "")
        content = jsonl(MANY[begin : begin + 1000])
        (folder / "shards" / name).write_bytes(gzip.compress(content) if i == 1 else content)
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize(
    "name",
    ["a.json", "b.jsonl", "c.json.gz", "d.ndjson.gz", "e.jsonl.zst", "f.parquet", "stream.arrow", "file.arrow"]
    + ["saved", "saved_splits", "shards"],
)
def test_every_kind_gives_the_same_rows_from_any_start(kinds, name, streaming):
    source = Source(kinds[name], streaming=streaming)
    rows = list(source)
    assert [row.data for row in rows] == MANY
    if name != "shards":
        assert [row.number for row in rows] == list(range(1, 2501))
    for start in (1, 999, 1000, 1100, 2499, 2500, 9999):
        assert list(source.rows(start)) == rows[start:]
    if streaming:
        with pytest.raises(TypeError, match="no length"):
            len(source)
    else:
        assert len(source) == 2500


def test_max_samples_takes_the_first_rows(write):
    path = write(ROWS)
    assert [row.data for row in Source(path, max_samples=2)] == ROWS[:2]
    assert (len(Source(path, max_samples=2)), len(Source(path, max_samples=99))) == (2, 5)
    assert [row.data for row in Source(path, max_samples=3, streaming=True).rows(1)] == ROWS[1:3]
    assert list(Source(path, max_samples=3).rows(4)) == []
    assert refused(path, max_samples=0).where == "dataset.max_samples"


def test_a_stream_reads_only_what_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(ROWS[:2]) + b"{broken\n" + jsonl(ROWS[2:]))
    source = Source(str(path), streaming=True)
    assert [row.data for row in islice(source, 2)] == ROWS[:2]
    assert [row.data for row in source.rows(3)] == ROWS[2:]  # a skipped line is not parsed
    assert refused(path).where == f"{path}:3"


def test_parquet_groups_before_the_start_are_not_read(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MANY[:30]), path, row_group_size=10)
    broken = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    begin = broken.dictionary_page_offset
    content[begin : begin + broken.total_compressed_size] = b"\xff" * broken.total_compressed_size
    path.write_bytes(content)
    source = Source(str(path), streaming=True)
    assert [row.data for row in islice(source, 10)] == MANY[:10]
    assert [row.data for row in source.rows(20)] == MANY[20:30]
    error = refused(path)
    assert "not a readable Parquet file" in error.message and error.where == str(path)


def test_fingerprints_follow_the_content(tmp_path, write):
    first, other = write(ROWS, "a.jsonl"), write(ROWS[:4], "b.jsonl")
    os.link(first, tmp_path / "same.jsonl")
    os.link(first, tmp_path / "same.csv")
    prints = [
        Source(str(path)).fingerprint() for path in (first, tmp_path / "same.jsonl", other, tmp_path / "same.csv")
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


# folders and splits


def test_a_folder_by_split(tmp_path, write):
    write(ROWS[:2], "folder/train-00000.jsonl")
    write(ROWS[2:4], "folder/train-00001.jsonl")
    write(ROWS[4:], "folder/validation.jsonl")
    assert [row.data for row in Source(str(tmp_path / "folder"))] == ROWS[:4]
    assert [row.data for row in Source(str(tmp_path / "folder"), split="validation")] == ROWS[4:]
    with pytest.raises(ConfigError, match="'test'.*found: train, validation"):
        Source(str(tmp_path / "folder"), split="test")
    with pytest.raises(ConfigError, match="a file is read whole"):
        Source(str(tmp_path / "folder" / "validation.jsonl"), split="validation")


def test_a_folder_without_split_names_is_all_train(tmp_path, write):
    write(ROWS[:2], "plain/a.json")
    write(ROWS[2:], "plain/deeper/b.json")
    write({"features": {}}, "plain/dataset_info.json")  # what the datasets library writes beside its data
    write([{"hidden": 1}], "plain/.cache/c.json")
    assert [row.data for row in Source(str(tmp_path / "plain"))] == ROWS


def test_which_folders_name_splits(kinds, tmp_path, write):
    write(ROWS, "train_and_test/train.jsonl")
    write(ROWS, "train_and_test/test.jsonl")
    write(ROWS, "one/rows.jsonl")
    write(ROWS, "one/more_eval.jsonl")
    write(ROWS, "deeper/validation/a.jsonl")
    write(ROWS, "none/trained.jsonl")
    for name in ("train_and_test", "one", "deeper"):
        assert names_splits(tmp_path / name), name
    assert names_splits(Path(kinds["saved_splits"]))
    for folder in (tmp_path / "none", kinds["saved"]):
        assert not names_splits(Path(folder)), folder


def test_a_folder_of_two_kinds_is_refused(tmp_path, write):
    write(ROWS, "mixed/a.jsonl")
    (tmp_path / "mixed" / "b.csv").write_text("a,b\n1,2\n")
    assert "mixes CSV and JSON files" in refused(tmp_path / "mixed").message
    (tmp_path / "empty").mkdir()
    assert "no data file" in refused(tmp_path / "empty").message


def test_splits_of_saved_folders(kinds, tmp_path):
    assert [row.data for row in Source(kinds["saved_splits"], split="test")] == MANY[:1]
    assert "found: test, train" in refused(kinds["saved_splits"], split="validation").message
    assert "no split 'validation'" in refused(kinds["saved"], split="validation").message
    (tmp_path / "broken").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "broken" / name).write_text("{")
    assert "not a readable folder of save_to_disk" in refused(tmp_path / "broken").message


# the hub, from the library's own cache, without a network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """owner/sums with configurations plain and hard, as the datasets library caches them."""
    import huggingface_hub

    # both read HF_HUB_OFFLINE once, when they are imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    for configuration, rows in (("plain", ROWS), ("hard", ROWS[:2])):
        folder = tmp_path / "hub" / "owner___sums" / configuration / "0.0.0" / "0123456789abcdef"
        folder.mkdir(parents=True)
        write_arrow(folder / "sums-train.arrow", rows, pyarrow.ipc.new_stream)
        split = datasets.SplitInfo("train", num_examples=len(rows))
        info = datasets.DatasetInfo(
            features=datasets.Dataset.from_list(rows).features,
            dataset_name="sums",
            config_name=configuration,
            splits=datasets.SplitDict({"train": split}),
        )
        info.write_to_directory(str(folder))


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_a_hub_data_set(hub, streaming):
    source = Source("owner/sums:plain", streaming=streaming)
    assert [row.data for row in source] == ROWS
    assert [(row.data, row.number, row.where) for row in source.rows(3)] == [
        (ROWS[3], 4, "owner/sums:plain"),
        (ROWS[4], 5, "owner/sums:plain"),
    ]
    assert [row.data for row in Source("owner/sums:hard", streaming=streaming)] == ROWS[:2]
    assert Source("owner/sums:hard").fingerprint() != Source("owner/sums:plain").fingerprint()
    assert (
        "it cannot be loaded from the hub" in refused("owner/sums:plain", split="absent", streaming=streaming).message
    )


def test_a_hub_data_set_is_loaded_at_the_commit_that_was_asked_for(tmp_path):
    commit, asked = "0123456789abcdef0123456789abcdef01234567", []

    class Hub(http.server.BaseHTTPRequestHandler):
        """Knows the data set's newest commit, and no file."""

        def do_GET(self):
            asked.append(self.path)
            newest = self.path.partition("?")[0] == "/api/datasets/owner/sums"
            body = json.dumps({"id": "owner/sums", "sha": commit}).encode() if newest else b"{}"
            self.send_response(200 if newest else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # the libraries read where the hub is once, when they are imported
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        program = "from primus_bridge.data.sources import Source; Source('owner/sums')"
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, env={**os.environ, **environment, "HF_HUB_OFFLINE": "0"}, capture_output=True, text=True
        )
        server.shutdown()
    assert "it cannot be loaded from the hub" in done.stderr
    named = [path for path in asked if "/resolve/" in path or "/revision/" in path]
    assert named and all(commit in path for path in named)


def test_a_hub_id_that_cannot_be_had(hub):
    error = refused("nobody/nothing-of-that-name", key="dataset.validation_data_path")
    assert "hub" in error.message and "set dataset.validation_data_path" in error.message
    assert "neither a file, a folder, nor a hub id" in refused("what is this?").message


def test_a_missing_file_is_not_tried_on_the_hub(tmp_path):
    for path in (str(tmp_path / "absent.jsonl"), "absent/train.jsonl.gz", "rows.csv", "./absent", "~/absent"):
        error = refused(path)
        assert "no such file or folder (looked for /" in error.message and "hub" not in error.message


# JSON


def test_crlf_blank_lines_and_byte_order_mark(tmp_path):
    path = tmp_path / "windows.jsonl"
    lines = [json.dumps(ROWS[0]), "", json.dumps(ROWS[1]), "   "]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    source = Source(str(path))
    assert len(source) == 2
    assert [(row.data, row.where) for row in source] == [(ROWS[0], f"{path}:1"), (ROWS[1], f"{path}:3")]
    assert [row.where for row in source.rows(1)] == [f"{path}:3"]


def test_jsonl_under_the_name_json(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert [row.data for row in Source(str(path))] == ROWS


def test_malformed_jsonl_names_the_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n\n{"instruction": "x", "output": \n')
    error = refused(path)
    assert error.where == f"{path}:3" and "malformed JSON" in error.message


def test_malformed_json_names_the_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[\n{"instruction": "x", "output": "y"},\n{"instruction": "x", "output": }\n]')
    assert refused(path).where == f"{path}:3"
    path.write_text('[\n{"instruction": "x", "output": "y"}\n{"instruction": "x", "output": "y"}]')
    assert refused(path).where == f"{path}:3"
    path.write_text('[{"instruction": "x", "output": "y"},\n')
    assert "malformed" in str(refused(path))
    path.write_text("[]\n[]")
    assert refused(path).where == f"{path}:2"


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst", "rows.csv", "rows.tsv.gz"]
)
def test_invalid_utf8_names_the_line(tmp_path, name):
    path = tmp_path / name
    content = b'[\n{"instruction": "\xe9t\xe9", "output": "y"}]'
    if ".jsonl" in name:
        content = json.dumps(ROWS[0]).encode() + b'\n{"instruction": "\xe9t\xe9", "output": "y"}\n'
    elif ".json" not in name:
        content = b'instruction\n"two\nlines \xe9"\n'
    if name.endswith(".zst"):
        write_zst(path, content)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    error = refused(path)
    assert error.where == f"{path}:{3 if content.startswith(b'instruction') else 2}"
    assert "invalid UTF-8 (byte 0xe9)" in error.message


def test_rows_without_rows(tmp_path):
    for name, content in (("a.jsonl", "\n\n"), ("b.json", "[]"), ("c.json", ""), ("d.csv", ""), ("e.csv", "a,b\n")):
        (tmp_path / name).write_text(content)
        source = Source(str(tmp_path / name))
        assert (len(source), list(source)) == (0, [])


def test_other_files_are_refused(tmp_path):
    for name in ("rows.xlsx", "rows.parquet.gz", "rows.gz"):
        (tmp_path / name).write_text("x")
        error = refused(tmp_path / name)
        assert name.removeprefix("rows") in error.message and ".jsonl" in error.message
    for name, kind in (("rows.parquet", "Parquet"), ("rows.arrow", "Arrow"), ("empty.arrow", "Arrow")):
        (tmp_path / name).write_text("" if "empty" in name else "neither of the two")
        error = refused(tmp_path / name)
        assert f"not a readable {kind} file" in error.message and error.where == str(tmp_path / name)
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    assert "must be an object" in refused(tmp_path / "list.jsonl").message


# compressed files


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_or_corrupt_file_is_one_error(tmp_path, suffix):
    path = tmp_path / f"rows.jsonl{suffix}"
    write_zst(path, jsonl(MANY)) if suffix == ".zst" else path.write_bytes(gzip.compress(jsonl(MANY)))
    whole = path.read_bytes()
    middle = len(whole) // 2
    # pyarrow writes zstd without a checksum
    flipped = (
        b"(\xb5/\xfd"
        if suffix == ".zst"
        else whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 40]) + whole[middle + 40 :]
    )
    for content in (whole[:middle], b"this was never compressed", flipped):
        path.write_bytes(content)
        error = refused(path)
        assert f"the {suffix} file is truncated or corrupt" in error.message and error.where == str(path)
        assert "\n" not in str(error)
    path.write_bytes(whole + whole)  # several streams in one file, as parallel compressors write
    assert len(Source(str(path))) == 5000


# CSV


def test_csv_and_tsv_keep_every_value_as_text(tmp_path):
    rows = [
        {"instruction": "a, b", "zip": "007", "output": ""},
        {"instruction": 'say "hi"\r\nthen 漢字 😀', "zip": "1e5", "output": "true\t"},
        {"instruction": "x" * 1_000_000, "zip": "2020-01-01", "output": " y "},
    ]
    for name, dialect in (("rows.csv", "excel"), ("rows.tsv", "excel-tab")):
        path = tmp_path / name
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
            file.write("\r\n")
        source = Source(str(path))
        assert [row.data for row in source] == rows and len(source) == 3
        assert [(row.number, row.where) for row in source] == [(1, f"{path}:2"), (2, f"{path}:3"), (3, f"{path}:5")]
        assert [row.data for row in Source(str(path), streaming=True).rows(2)] == rows[2:]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("a,b\n1,2\n3\n", 3, "row 2 has 1 cells, the header 2 (a, b)"),
        ("a,b\n1,2\n\n3,4,5\n", 4, "row 2 has 3 cells"),
        ('a,b\n1,"2\n3,4\n5,6\n', 2, "malformed CSV: unexpected end of data"),
        ('a,b\n"1"x,2\n', 2, "malformed CSV"),
        ("a,a\n1,2\n", 1, "two columns are named 'a'"),
    ],
)
def test_a_wrong_csv_is_named(tmp_path, content, line, message):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    error = refused(path)
    assert error.where == f"{path}:{line}" and message in error.message
