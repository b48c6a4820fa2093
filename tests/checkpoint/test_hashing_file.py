"""The checksum of a file that is being written is that of the file."""

from __future__ import annotations

import hashlib
import os
import resource
import signal

import pytest
import torch

from primus_bridge.files import file_digest
from primus_bridge.hashing_file import LARGE, HashingFile


@pytest.mark.parametrize(
    "sizes", [[], [1], [3, 0, 5], [LARGE], [LARGE + 1, 7], [2**20] * 20, [5 * LARGE, 1, 2**20 + 1]]
)
def test_it_is_the_files(sizes, tmp_path):
    file, whole = HashingFile(tmp_path / "f"), hashlib.sha256()
    for size in sizes:
        data = os.urandom(size)
        whole.update(data)
        assert file.write(data) == size
    assert file.tell() == sum(sizes)
    assert file.close() == whole.hexdigest() == file_digest(tmp_path / "f")


def test_torch_saves_into_it(tmp_path):
    state = {"large": torch.randn(4 * LARGE // 4), "small": torch.arange(3)}
    file = HashingFile(tmp_path / "f")
    torch.save(state, file)
    assert file.close() == file_digest(tmp_path / "f")
    again = torch.load(tmp_path / "f", weights_only=True)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_full_disk_is_an_error(tmp_path):
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * LARGE, hard))
    try:
        file = HashingFile(tmp_path / "f")
        with pytest.raises(OSError, match="File too large"):
            for _ in range(3):
                file.write(b"x" * LARGE)
            file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
