"""In an environment with Megatron-Bridge: commands one after the other, in one process.

    python -m tests.bridge.runs COMMANDS.json OUT.json

COMMANDS.json: name -> words of ``primus``. OUT.json: name -> exit code, stdout and stderr; and under "packed" what
the engine makes of a packed row.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

from primus_bridge.cli.main import main


def printed(words: list[str]) -> list:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main(words)
        except BaseException:
            code = 1
            traceback.print_exc(file=errors)
    return [code, out.getvalue(), errors.getvalue()]


def packed_params() -> list:
    """[ends of the documents, longest] as the engine's own reader takes them from a batch of one packed row."""
    import torch
    from megatron.bridge.training.utils.packed_seq_utils import get_packed_seq_params

    from tests.bridge.packed import packed_rows

    rows = packed_rows()
    batch = next(iter(torch.utils.data.DataLoader(rows, batch_size=1, sampler=[0])))
    params = get_packed_seq_params(batch)
    return [params.cu_seqlens_q.tolist(), int(params.max_seqlen_q), batch["tokens"].shape[1]]


if __name__ == "__main__":
    commands, out = sys.argv[1:]
    results = {name: printed(words) for name, words in json.loads(Path(commands).read_text()).items()}
    results["packed"] = packed_params()
    Path(out).write_text(json.dumps(results))
