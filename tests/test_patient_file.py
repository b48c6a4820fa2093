"""Files that wait for room on the disk."""

from __future__ import annotations

import pytest

from primus_bridge.errors import ConfigError
from primus_bridge.files import write_text
from primus_bridge.patient_file import AppendedFile, PatientFile
from tests.full_disk import files_up_to

REFUSED = "cannot write the run's files: File too large"


def test_pieces_wait_in_their_order_and_none_is_cut(tmp_path, capsys):
    path = tmp_path / "lines"
    file = AppendedFile(path)
    file.add(b"first\n", must=True)
    with files_up_to(10):
        file.add(b"second\n")
        assert path.read_bytes() == b"first\n"
        file.add(b"3\n")
        with pytest.raises(ConfigError, match=REFUSED):
            file.retry(must=True)
        assert path.read_bytes() == b"first\n" and file.waiting == [b"second\n", b"3\n"]
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and f"{REFUSED} (" in out and "what lines lacks waits in memory" in out
    file.retry()
    file.add(b"fourth\n")
    assert path.read_bytes() == b"first\nsecond\n3\nfourth\n" and file.waiting == []
    assert capsys.readouterr().out == f"note: {path} is written again, nothing is missing from it\n"


def test_a_rewind_takes_no_room(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"first\nsecond\ncut o")
    with files_up_to(0):
        file = AppendedFile(path)
        file.rewind(6, [], must=True)
        assert path.read_bytes() == b"first\n"
        file.add(b"third\n")
        file.rewind(6, [b"other\n"])
    file.retry()
    assert path.read_bytes() == b"first\nother\n"


def test_a_file_that_is_gone_begins_again(tmp_path):
    file = AppendedFile(tmp_path / "lines")
    file.add(b"first\n")
    file.path.unlink()  # to make room
    file.add(b"second\n")
    assert file.path.read_bytes() == b"second\n"


def test_of_whole_files_the_newest_waits(tmp_path, capsys):
    file = PatientFile(tmp_path / "whole")
    with files_up_to(3):
        file.write(lambda: write_text(file.path, "older"))
        file.write(lambda: write_text(file.path, "newer"))
    assert not list(tmp_path.iterdir())
    file.retry(must=True)
    assert file.path.read_text() == "newer"
    assert capsys.readouterr().out.count("WARNING") == 1


def test_a_defect_is_no_full_disk(tmp_path):
    with pytest.raises(ZeroDivisionError):
        PatientFile(tmp_path / "whole").write(lambda: 1 // 0)
