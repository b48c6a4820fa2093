"""Text files as lines of bytes, compressed or not; an unreadable byte is named by file and line."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from primus_bridge.errors import ConfigError

COMPRESSIONS = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def plain_suffix(path: Path) -> str:
    """The suffix in lower case, without one of COMPRESSIONS: ``.jsonl`` of ``Rows.jsonl.gz``."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed. Raises ConfigError when they cannot be read to their end."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    try:
        with contextlib.ExitStack() as stack:
            if compression == ".gz":
                file = cast(BinaryIO, stack.enter_context(gzip.open(path, "rb")))
            elif compression == ".zst":
                import pyarrow  # Python itself reads zstd from 3.14 on

                file = stack.enter_context(io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
            else:
                file = stack.enter_context(open(path, "rb"))
            yield file
    except (OSError, EOFError, zlib.error) as error:
        what = f"the {compression} file is truncated or corrupt" if compression else "cannot read it"
        raise ConfigError(f"{what}: {error}; make or download it again", where=str(path)) from error


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of every line, without a byte-order mark."""
    with opened(path) as file:
        for line, raw in enumerate(file, start=1):
            yield line, raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw


def decoded(raw: bytes, path: Path, first_line: int) -> str:
    """The text of ``raw``, which begins at ``first_line``. Raises ConfigError with the line that is no UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ConfigError(
            f"invalid UTF-8 (byte 0x{raw[error.start]:02x}); convert the file, for example with "
            "'iconv -f latin1 -t utf-8'",
            where=f"{path}:{line}",
        ) from None
